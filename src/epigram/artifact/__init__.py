"""The single file that ships: container, tensors, tokenizer, codecs, and the arithmetic of the cap."""
