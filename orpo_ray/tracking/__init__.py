"""MLflow and Prometheus: writing runs and reading them back."""
