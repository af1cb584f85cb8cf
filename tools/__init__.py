"""Commands around a trained model: export, import, evaluate."""
