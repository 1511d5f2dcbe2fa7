"""Tasks as data: a YAML file says what a model is asked on which records, and how its answers are scored."""
