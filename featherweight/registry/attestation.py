"""Signed statements about a version: every file of its folder, in the OpenSSF model-signing way, and which version it is.

`model.sig` lies in the folder: an in-toto statement in a Sigstore bundle that names each file with its digest. The lineage is
one of them, and with it the recipe, the parents and the evaluation.
"""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

from featherweight.errors import IntegrityError, one_line
from featherweight.registry.keys import Keys
from featherweight.registry.versions import TAG, RegisteredVersion
from featherweight.store.artifact import describe_files

SIGNATURE = "model.sig"
BY_MLFLOW = "registered_model_meta"  # MLflow writes it beside the files of a local store when it loads a version
ATTESTATION = f"{TAG}attestation"


def sign_folder(folder: Path, keys: Keys) -> None:
    """Write `folder/model.sig` over all other files. Nothing without a private key."""
    if keys.private is None:
        return
    from model_signing import hashing, signing

    hashed = hashing.Config().set_ignored_paths(paths=[folder / SIGNATURE, folder / BY_MLFLOW], ignore_git_paths=False)
    signer = signing.Config().use_elliptic_key_signer(private_key=keys.private).set_hashing_config(hashed)
    signer.sign(folder, folder / SIGNATURE)


def folder_faults(folder: Path, keys: Keys) -> dict[str, str]:
    """What is wrong with a signed folder, by file: 'altered', 'missing', 'foreign', or why its signature is not trusted."""
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    if not (folder / SIGNATURE).is_file():
        return {SIGNATURE: "missing: nobody signed these files, or the signature was removed"}
    reason = "no key is trusted here"
    for public in keys.public:
        try:
            verifying.Config().use_elliptic_key_verifier(public_key=public).verify(folder, folder / SIGNATURE)
            return _foreign(folder)
        except (ValueError, InvalidSignature, KeyError, TypeError, OSError, RecursionError) as error:
            reason = one_line(error)
            if reason.startswith("Signature mismatch"):  # the statement is trusted, the files are not those that it names
                return _differences(folder) or {SIGNATURE: reason}
    return {SIGNATURE: f"altered: no trusted key signed it ({reason or 'the signature is not valid'})"}


def _foreign(folder: Path) -> dict[str, str]:
    """Files that no statement names, such as those of git, which the verification passes by."""
    names = {str(Path(parent, name).relative_to(folder)) for parent, _, found in os.walk(folder) for name in found}
    named = set(_named(folder)) | {SIGNATURE, BY_MLFLOW}
    return {name: "foreign" for name in names - named if not name.startswith(f"{BY_MLFLOW}/")}


def _named(folder: Path) -> dict[str, str]:
    """Digests by file, as the folder's statement has them."""
    bundle = json.loads((folder / SIGNATURE).read_text())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    return {one["name"]: one["digest"] for one in statement["predicate"]["resources"]}


def _differences(folder: Path) -> dict[str, str]:
    """The files that are not those that the folder's statement names."""
    named = _named(folder)
    found = {name: file for name, file in describe_files(folder).items() if name not in (SIGNATURE, BY_MLFLOW)}
    words = {name: "missing" if name not in found else "foreign" for name in named.keys() ^ found.keys()}
    return words | {name: "altered" for name in named.keys() & found.keys() if named[name] != found[name].sha256}


def require_signed(folder: Path, keys: Keys) -> None:
    """Raise IntegrityError naming what differs where keys are trusted here and none vouches for a folder; nothing without keys."""
    faults = folder_faults(folder, keys) if keys.public else {}
    if faults:
        told = ", ".join(f"{name} ({word})" for name, word in sorted(faults.items()))
        raise IntegrityError(f"the registered model in {folder} is not what was signed: {told}")


def statement(version: RegisteredVersion, born: int) -> str:
    """What an attestation says of a version: that this number of this model is these files with this lineage."""
    told = {"model_born": born, "version": version.version, "source": version.source, "digest": version.digest}
    return json.dumps(told | {"lineage": version.tag("lineage")}, sort_keys=True)


def attested(version: RegisteredVersion, born: int, keys: Keys) -> bool:
    """Whether a trusted key signed that this version is what it says."""
    return keys.signed(statement(version, born), version.tags.get(ATTESTATION, ""))
