"""Analysis: what a trained model gets right, and where."""
