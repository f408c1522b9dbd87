"""Publishing: the head's folder with its card and the evidence, uploaded to the hub."""

from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id
from rich.console import Console

from drafthead.errors import ClaimFailed, DraftheadError
from drafthead.fsio import RunLock, sha256_file, write_bytes
from drafthead.progress import waiting, waiting_for_library
from drafthead.prove.proof import proof_path, read_proof
from drafthead.recipe import Recipe
from drafthead.report.card import hub_id, write_card
from drafthead.report.page import render
from drafthead.report.results import read_results
from drafthead.rundir import RunDir


def files_to_publish(run: RunDir) -> dict[str, Path]:
    """Every file that goes to the hub, by its path there: the head, its card, the evidence."""
    files = {
        str(path.relative_to(run.head)): path
        for path in sorted(run.head.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
    evidence = (proof_path(run), run.verify_json, run.bench_json, run.report_html)
    return files | {path.name: path for path in evidence}


def publish(
    recipe: Recipe, run: RunDir, *, repo: str | None, dry_run: bool, console: Console
) -> dict:
    """Upload a run's head to the hub in one commit, its card and report written anew.

    Args:
        recipe: the recipe of the head, of one kind.
        run: where it was made.
        repo: OWNER/NAME; None is the recipe's ``publish.repo``.
        dry_run: list the files and upload nothing.
        console: where people read the list.

    Returns:
        ``repo``, ``files`` (path, bytes, sha256), and the ``url`` of the commit if there is one.

    Raises:
        DraftheadError: verify or bench has not been run on this head, no repository is named,
            another process works in the run's folder, or the hub refuses.
        ClaimFailed: the head is not lossless.
    """
    repo = repo or recipe.publish.repo
    if repo is None:
        raise DraftheadError("no repository named: pass --repo OWNER/NAME or set publish.repo")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise DraftheadError(f"publish.repo: {repo!r} is not a repository name: {error}") from None
    if "/" not in repo:
        raise DraftheadError(f"publish.repo: {repo!r} names no owner; write OWNER/{repo}")
    section = recipe.publish.model_copy(update={"repo": repo})
    named = recipe.model_copy(update={"publish": section})
    read_proof(run)  # before the lock, which would make the folder of a run that is not there
    with RunLock(run.top):
        return _publish(named, run, repo, dry_run, console)


def _publish(recipe: Recipe, run: RunDir, repo: str, dry_run: bool, console: Console) -> dict:
    with waiting(console, "reading records and hashing the head"):
        results = read_results(recipe, run)
    if not results.bench:
        raise DraftheadError(
            f"{run.bench_json}: this head's speed was not measured; run `drafthead bench RECIPE`"
        )
    if not results.proof["lossless"]:
        raise ClaimFailed(f"{proof_path(run)}: not lossless; such a head is not published")
    write_bytes(run.report_html, render(results).encode())
    write_card(results)
    if hub_id(results) is None:
        console.print(
            "[yellow]publish.base_model is not set: the card cannot link its target[/yellow]"
        )
    files = files_to_publish(run)
    listed = [
        {"path": name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for name, path in files.items()
    ]
    for entry in listed:
        console.print(f"{entry['bytes']:>14,}  {entry['path']}")
    if dry_run:
        console.print(f"dry run: nothing was uploaded to {repo}")
        return {"repo": repo, "files": listed, "url": None}
    with waiting_for_library(console, f"uploading to {repo}"):
        url = _upload(repo, files, recipe.publish.private)
    return {"repo": repo, "files": listed, "url": url}


def _upload(repo: str, files: dict[str, Path], private: bool) -> str:
    """Make the repository if it is not there and commit the files; the commit's address."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(
            repo,
            [CommitOperationAdd(name, str(path)) for name, path in files.items()],
            commit_message="Draft head with card, proof and measurements",
        )
    except LocalTokenNotFoundError:
        raise DraftheadError("no hub token here; run `hf auth login` or set HF_TOKEN") from None
    except Exception as error:  # a hub that is not reached: an error of the HTTP library's own
        raise DraftheadError(f"{repo}: the hub refused or was not reached: {error}") from error
    return commit.commit_url
