"""The bundled model's world: builders of its sets, splits, tasks, judges, the demo."""
