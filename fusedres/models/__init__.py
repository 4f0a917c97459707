"""Finding residual layers in other people's models."""
