"""Long-context pretraining of GPT-style language models with attention of linear cost."""
