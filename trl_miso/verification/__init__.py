"""Is MISO exact on this model, tokenizer and rows? Checked before training, with the model's own forward."""
