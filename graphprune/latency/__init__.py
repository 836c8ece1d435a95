"""What a model costs in milliseconds: tables of measured pieces, and the sum over a model's."""
