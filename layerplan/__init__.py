"""layerplan measures a model's layers, plans what to freeze, trains the plan on Ray and judges the result."""

__version__ = "0.1.0"
