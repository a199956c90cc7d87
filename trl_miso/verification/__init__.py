"""Is MISO exact on this model, this tokenizer and these rows? Asked before training, with the model's own forward."""
