"""Fine-tunes a causal language model of the transformers library, with its attention and loss on fastlm.

    python examples/finetune_transformers.py --model FOLDER --data talks.txt --save tuned
    python examples/finetune_transformers.py --model FOLDER --lora 8     # low-rank updates alone, needs peft
    python examples/finetune_transformers.py                             # a small random GPT-2 of bytes

FOLDER is any that AutoModelForCausalLM loads; fastlm makes one of a model of its own:

    fastlm train --norm rmsnorm --out runs/mine
    fastlm export runs/mine --to FOLDER

fastlm.integrations.transformers.apply(model) is all that is changed: the model's attention runs fused, its loss
without logits in memory, and the library's Trainer and generate run as ever.
Needs transformers and accelerate.

Measured, two AVX2 cores, a minute and a half of CPU time: the random GPT-2 goes from 5.64 to 2.42 nats a byte of
text held out.
"""

import argparse
import math

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)  # fmt: skip

import fastlm.integrations.transformers as on_fastlm
from fastlm.data import list_documents


class Bytes:
    """The tokenizer of the random model."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


def load(folder: str | None) -> tuple[PreTrainedModel, AutoTokenizer | Bytes]:
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config = GPT2Config(
        vocab_size=256, n_positions=256, n_embd=128, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, initializer_range=0.06,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config), Bytes()


def examples(paths: list[str] | None, tokenizer, length: int, most: int) -> list[dict[str, list[int]]]:
    """Pieces of the texts, as the Trainer takes them; the library shifts the labels."""
    text = "".join(document.read() for document in list_documents(paths))[:most]
    tokens = tokenizer.encode(text)
    pieces = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main(arguments: list[str] | None = None) -> list[float]:
    """Loss on the text held out, in nats a token: before and after."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of a model [default: a small random GPT-2]")
    parser.add_argument(
        "--data", nargs="+", help="text files or folders [default: Python's standard library]"
    )
    parser.add_argument("--most", type=int, default=2_000_000, help="characters of the text to take")
    parser.add_argument("--lora", type=int, default=0, help="rank of low-rank updates [default: all weights]")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, help="[default: 1e-4; 2e-3 for the random model and with --lora]")
    parser.add_argument(
        "--save", default="runs/tuned", help="folder for the tuned model [default: runs/tuned]"
    )
    parser.add_argument("--write", type=int, default=100, help="tokens of the sample at the end")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    model, tokenizer = load(options.model)
    pieces = examples(options.data, tokenizer, options.length, options.most)
    held_out = max(1, min(len(pieces) // 20, 64))
    on_fastlm.apply(model)
    if options.lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=options.lora, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        model.print_trainable_parameters()

    rate = options.lr or (1e-4 if options.model and not options.lora else 2e-3)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=options.save,
            save_strategy="no",
            report_to="none",
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=options.steps // 10,
            logging_steps=max(1, options.steps // 10),
            seed=options.seed,
        ),
        train_dataset=pieces[:-held_out],
        eval_dataset=pieces[-held_out:],
    )
    found = [trainer.evaluate()["eval_loss"]]
    trainer.train()
    found.append(trainer.evaluate()["eval_loss"])
    print(f"held out: {found[0]:.3f}, then {found[1]:.3f} nats a token; perplexity {math.exp(found[1]):.2f}")
    if options.write:
        prompt = torch.tensor([pieces[-1]["input_ids"][: options.length // 4]], device=model.device)
        written = model.eval().generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=options.write, do_sample=True
        )
        print(tokenizer.decode(written[0].tolist()))
    on_fastlm.restore(model)
    model.save_pretrained(options.save)  # with --lora the updates alone
    if options.model:
        tokenizer.save_pretrained(options.save)
    return found


if __name__ == "__main__":
    main()
