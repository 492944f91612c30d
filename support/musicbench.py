"""MusicBench, captioned music of Melechovsky et al., 2023 ("Mustango"): fetched, unpacked once, read as a data set."""

import json
import os
import shutil
import tarfile
import zlib
from gzip import BadGzipFile

from filelock import FileLock

from support.cli import say
from support.data import find_entries, texts_of
from support.files import whole_file
from support.hub import fetch

REPOSITORY, ARCHIVE = "amaai-lab/MusicBench", "MusicBench.tar.gz"  # a data set of the Hugging Face hub
LISTS = ("MusicBench_train.json", "MusicBench_test_A.json", "MusicBench_test_B.json")


def plain_only(member, folder):
    """`tarfile`'s filter for files and folders inside `folder`; links are refused as well."""
    if member.issym() or member.islnk():
        raise tarfile.TarError(f"{member.name!r} is a link")
    return tarfile.data_filter(member, folder)


def unpack(archive, folder):
    """Unpack an archive into a new `folder`, or nothing of it. ValueError: damage, a link, a device, a way out."""
    if not hasattr(tarfile, "data_filter"):
        raise ValueError(f"{archive}: unpacking it safely wants Python 3.10.12, 3.11.4, 3.12 or later")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed process left behind
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter=plain_only)
            while tar.fileobj.read(2**20):  # to the very end, where the checksum is
                pass
        os.replace(partial, folder)
    except (tarfile.TarError, EOFError, zlib.error, BadGzipFile) as error:
        text = f"{archive}: is damaged or dangerous, nothing is unpacked ({error}); remove it and try again"
        raise ValueError(text) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def musicbench_entries(folder, caption_key, sample_rate):
    """(training entries, entries of test A) for `load_data`; fetched and unpacked once. ConnectionError."""
    source, root, entries = fetch(REPOSITORY, *LISTS, ARCHIVE, repo_type="dataset"), folder / "datashare", []
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            say(f"unpacking {source / ARCHIVE} into {folder}")
            unpack(source / ARCHIVE, folder)
    for path in [source / name for name in LISTS[:2]]:
        lines, manifest = [], root / f"{path.stem}.jsonl"
        for line in path.read_bytes().splitlines():
            location, = texts_of(line, "location")  # its folder's _aug2 may lack, or be too much
            other = location.replace(*("_aug2/", "/") if "_aug2/" in location else ("/", "_aug2/"), 1)
            lines.append(json.loads(line) | {"location": location if (root / location).is_file() else other})
        with whole_file(manifest) as temporary:
            temporary.write_text("\n".join(map(json.dumps, lines)), "utf-8")
        found, skipped, _ = find_entries(manifest, "location", caption_key, sample_rate)
        say("".join(f"skipped {where}: {why}\n" for where, why in skipped) + f"{path.name}: {len(found)} recordings")
        entries.append(found)
    return entries
