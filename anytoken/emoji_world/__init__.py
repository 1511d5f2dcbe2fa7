"""What only the bundled model's world needs: builders of its sets, splits, tasks, judges, the demo."""
