"""Uploading a finished model to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from tunesmith.errors import TunesmithError
from tunesmith.evaluation.unseen import CARRIED


def publish(
    folder: Path, repository: str, *, private: bool, token: str | None = None, create: bool = True
) -> str:
    """Create the repository where it is missing, upload the model's folder, and give its address.

    Without `token` it is the Hub client's own (login or HF_TOKEN); it is never stored or shown here. With
    `create` false the repository has to be there. Raises TunesmithError with the Hub's answer where that
    fails; the local model stays as it is.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi(token=token or None)
    try:
        if create:
            api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            folder_path=folder,
            repo_id=repository,
            commit_message="Upload by tunesmith",
            ignore_patterns=[CARRIED],
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError, ValueError) as error:
        said = next(iter(str(error).splitlines()), "")
        for known in (token, get_token()):  # some clients quote the header that they could not send
            said = said.replace(known, "***") if known else said
        mend = "Log in with `hf auth login`, check the name, and upload again with `tunesmith push`."
        if not create:
            mend = "Create the repository first (create_new=True), log in with `hf auth login`, or check the name."
        raise TunesmithError(
            f"The model was not uploaded to {repository}; it is whole in {folder}.",
            found=f"{type(error).__name__}: {said[:300]}",
            fix=mend,
        ) from None
    return str(commit.repo_url)
