"""The built-in world: its questions, and the models that were trained on them."""
