"""fastlm inside other libraries: each module is the only importer of its library."""
