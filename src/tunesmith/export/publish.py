"""Uploading a finished model to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from tunesmith.errors import TunesmithError


def publish(folder: Path, repository: str, *, private: bool) -> str:
    """Create the repository where it is missing, upload the model's folder, and give its address.

    The token is the Hub client's own (login or HF_TOKEN); it is never read or stored here. Raises
    TunesmithError with the Hub's answer where that fails; the local model stays as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            folder_path=folder, repo_id=repository, commit_message="Upload by tunesmith"
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError, ValueError) as error:
        raise TunesmithError(
            f"The model was not uploaded to {repository}; it is whole in {folder}.",
            found=f"{type(error).__name__}: {str(error).splitlines()[0][:300]}",
            fix="Log in with `hf auth login`, check the name, and upload again with `tunesmith push`.",
        ) from error
    return str(commit.repo_url)
