"""Language models with trained weights: SmolLM2, Llama checkpoints, saved decoders and training runs."""
