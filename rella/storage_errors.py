"""What a filesystem or an object store raised, as one message: which file, what is wrong, what to do."""

from __future__ import annotations

import errno
import os
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from rella.errors import RellaError, StorageError

MAKE_ROOM = "free space there, or give another --storage"
_OTHERWISE = "check --storage and start the job again, what is finished is kept"
USE = "give a folder, or a URI such as s3://bucket/rella"
TEMPORARY = "set TMPDIR to a folder that can be written and has space"
_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile in ~/.aws"


# (numbers, what is wrong, remedy). The first five are of folders.
_FULL = (errno.ENOSPC, errno.EDQUOT), "the disk is full", MAKE_ROOM
_LOCKED = (errno.EROFS,), "the file system is read-only", "mount it writable, or give another --storage"
_NOT_YOURS = (errno.EACCES, errno.EPERM), "the permissions forbid it", "change them, or give another --storage"
_BLOCKED = (errno.ENOTDIR, errno.EEXIST), "a file, not a folder, is there", "move it, or give another --storage"
_GONE = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT), "the disk or network mount fails", "check it"
_FULL_STORE = (errno.ENOSPC,), "the object store is full", MAKE_ROOM
_STRANGER = (errno.EACCES,), "the object store does not know the credentials", f"set {_KEYS}, on all nodes"
_DENIED = (errno.EACCES,), "the object store denies access", f"set credentials that may read and write ({_KEYS})"
_NO_BUCKET = (errno.ENOENT,), "there is no such bucket", "create it, or correct bucket and endpoint in --storage"
_AWAY = (errno.EHOSTUNREACH,), "the object store cannot be reached", "check endpoint, network and server"
_SAID = {
    r"XMinioStorageFull|Insufficient_?Storage|Quota_?Exceeded|status 507": _FULL_STORE,
    r"Invalid_?Access_?Key|Signature_?Does_?Not|(Expired|Invalid)_?Token|Token_?Id|Unauthenticated": _STRANGER,
    r"Missing_?Authentication|Unrecognized_?Client|No credentials": _STRANGER,
    r"Access_?Denied|status 403|Permission_?Denied|Forbidden": _DENIED,
    r"No_?Such_?Bucket|Bucket\s+not found|Resource_?Not_?Found|status 404": _NO_BUCKET,
    r"Network_?Connection|curlCode|could not resolve|connection refused|timed? ?out|status 50[234]": _AWAY,
}
"""The errors of object stores have no number: words of their messages tell."""


@contextmanager
def explained(front: str, remedy: str = "") -> Iterator[None]:
    """Turn whatever a filesystem raises into a `StorageError` that starts with `front`."""
    try:
        yield
    except RellaError:
        raise
    except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise _storage_error(error, front, remedy) from error


def _storage_error(error: Exception, front: str, remedy: str) -> StorageError:
    """Say what is wrong and what to do; `remedy` is preferred to those of folders."""
    code = (error.errno if isinstance(error, OSError) else None) or 0
    for codes, what, mend in (_FULL, _LOCKED, _NOT_YOURS, _BLOCKED, _GONE):
        if code in codes:
            file = getattr(error, "filename", None) if codes is _BLOCKED[0] else None
            why = f"{os.strerror(code)}: {file}" if file else os.strerror(code)
            return with_errno(code, f"{front}: {what} ({why}): {remedy or mend}")
    said = without_secrets(str(error))
    # What the AWS SDK was doing for which key is known already.
    quoted = os.strerror(code) if code else said[max(said.find("AWS Error"), 0) :]
    quoted = textwrap.shorten(quoted, 200, placeholder=" …")
    # Names of files are no sign of what went wrong.
    plain = re.sub(r"'[^']*'", "", said)
    for words, (codes, what, mend) in _SAID.items():
        if re.search(words, plain, re.IGNORECASE):
            return with_errno(codes[0], f"{front}: {what}: {mend}\n({quoted})")
    code = code or (errno.EIO if isinstance(error, OSError) else errno.EINVAL)
    return with_errno(code, f"{front}: {quoted}: {remedy or _OTHERWISE}")


def with_errno(code: int, message: str) -> StorageError:
    """Return the error with its number."""
    # Given to the constructor, the number would stand before the message.
    error = StorageError(message)
    error.errno = code
    return error


def without_secrets(text: str) -> str:
    """Hide `key:secret@` of a URI and options such as `secret_key=`."""
    text = re.sub(r"(://)[^/\s?]*:[^?'\"]*@", r"\1***@", text)
    return re.sub(r"(\w*(?:secret|token|password|key|sig)\w*=)[^&\s'\"]*", r"\1***", text, flags=re.IGNORECASE)
