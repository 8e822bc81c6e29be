"""Compressed weights inside transformers models: the modules, the quantizer that installs them, loading and saving."""
