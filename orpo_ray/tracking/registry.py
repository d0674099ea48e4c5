"""Upload an exported model folder to MLflow and make it a version of a registered model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from orpo_ray.tracking.read_runs import asked


def publish(
    uri: str,
    name: str,
    run_id: str,
    folder: Path,
    digest: str,
    tags: Mapping[str, str],
    description: str,
    alias: str,
) -> tuple[str, bool]:
    """Register a model folder once and set the alias to it.

    Args:
        uri: tracking URI of MLflow.
        name: of the registered model, which is created if it does not exist.
        run_id: MLflow run that trained the model and receives the files.
        folder: the exported model.
        digest: of the folder's content; the same digest is registered only once per run.
        tags: of the version, without the `orpo_ray.` prefix.
        description: of the version.
        alias: set to the version.

    Returns:
        The version's number as text, and whether it is new.

    Raises:
        TrackingError: MLflow refuses or does not answer.
    """
    with asked(uri) as client:
        run = client.get_run(run_id)
        _ensure_registered_model(client, name)
        known = _known_version(client, name, run_id, digest)
        version = known
        if version is None:
            # The path contains the digest, so a version's files never change.
            path = f"model/{digest[:12]}"
            client.log_artifacts(run_id, str(folder), path)
            made = client.create_model_version(
                name,
                source=f"{run.info.artifact_uri}/{path}",
                run_id=run_id,
                tags={f"orpo_ray.{key}": value for key, value in tags.items()},
                description=description,
            )
            version = str(made.version)
        client.set_registered_model_alias(name, alias, version)
    return version, known is None


def _ensure_registered_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name, tags={"orpo_ray.task": "preference-tuning"})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _known_version(client: MlflowClient, name: str, run_id: str, digest: str) -> str | None:
    for version in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        if version.tags.get("orpo_ray.digest") == digest:
            return str(version.version)
    return None
