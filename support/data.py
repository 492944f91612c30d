"""Data sets of captioned audio -> cached codes and text embeddings -> batches.

A data set is a folder of audio files with captions beside them (NAME.txt or NAME.json), a JSON-lines manifest, or lists
of entries. The frozen codec and text encoder, which are handed in, see every clip once; what they give is kept in two
cache files, and training reads only that. It leaves out what large data sets need: shards, augmentation.
"""

import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from support.audio import audio_seconds, read_blocks
from support.cli import say
from support.files import fingerprint, read_checkpoint, whole_file

CAPTIONS = (".txt", ".json")
BATCH = 8  # clips that are encoded together
SILENT = 1e-4  # a clip whose samples all are below -80 dB
SAVE_SECONDS = 60.0  # at the least, between two writes of a cache file


@dataclass
class Entry:
    """A recording: `key`, hexadecimal, identifies its samples; `read(tell)` yields them as arrays (S,) float32, mono,
    at the codec's rate, and calls tell(text) with what is odd about them; it may raise ValueError or OSError."""

    name: str
    key: str
    read: Callable
    caption: str


@dataclass
class Clips:
    """Encoded clips. codes: (n, K, T) int16; n_frames: (n,) how many of the T frames are not padding; text: one float16
    tensor (L, C) per distinct caption, L = 0 for an empty one; caption: (n,) index into it; fingerprint: a hash of the
    keys and captions, in order, that tells data sets apart."""

    codes: torch.Tensor
    n_frames: torch.Tensor
    text: list
    caption: torch.Tensor
    fingerprint: str = ""

    def __len__(self):
        return len(self.codes)

    def batch(self, rows):
        """rows: (B,) long -> {"codes": (B, K, T) long, "text": (B, L, C) float32, "text_mask": (B, L) bool, "valid":
        (B, T) bool, False at the padding that fills short clips}."""
        texts = [self.text[i] for i in self.caption[rows]]
        text = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).float()
        if not text.shape[1]:  # only empty captions: one masked place, so that there is something to attend to
            text = text.new_zeros(len(texts), 1, text.shape[2])
        text_mask = torch.arange(text.shape[1]) < torch.tensor([len(t) for t in texts])[:, None]
        valid = torch.arange(self.codes.shape[2]) < self.n_frames[rows, None]
        return {"codes": self.codes[rows].long(), "text": text, "text_mask": text_mask, "valid": valid}


def texts_of(content, where, *keys):
    """The texts under some keys of the JSON record that the bytes `content` hold; ValueError says where they do not."""
    try:
        record = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON in UTF-8 ({error})") from error
    for key in keys:
        if not isinstance(record, dict) or not isinstance(record.get(key), str):
            raise ValueError(f"{where} has no text under the key {key!r}")
    return [record[key].encode("utf-8", "replace").decode() for key in keys]


def caption_beside(path, caption_key):
    """The caption of an audio file in NAME.txt, or in NAME.json under `caption_key`. ValueError: there is none."""
    text, record = map(path.with_suffix, CAPTIONS)
    try:
        if text.is_file():
            return text.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"its caption {text} is not UTF-8; save it in this encoding") from error
    if record.is_file():
        return texts_of(record.read_bytes(), f"its caption {record}", caption_key)[0]
    raise ValueError(f"has no caption; want {text.name} or {record.name} beside it")


def files_below(folder, skipped):
    """All files in a folder and its sub-folders, in order. Links are followed, but into no folder a second time."""
    files, seen = [], {folder.resolve()}
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=lambda error: skipped.append(
            (error.filename, f"is a folder that cannot be read ({error.strerror})"))):
        folders.sort()
        for path in [Path(parent, name) for name in folders]:
            if path.resolve() in {*seen, *Path(parent).resolve().parents}:
                folders.remove(path.name)
                skipped.append((path, "links to a folder that is read in another place"))
            seen.add(path.resolve())
        files += [Path(parent, name) for name in names]
    return sorted(files)


def find_entries(data, audio_key, caption_key, sample_rate):
    """(entries, [(name, why it is skipped)], number of captions) of a folder or a JSON-lines manifest: all it holds."""
    path, entries, skipped, captions = Path(data), [], [], set()
    if path.is_dir():
        files = files_below(path, skipped)
        stems = {file.with_suffix("") for file in files if file.suffix not in CAPTIONS}
        captions = {file for file in files if file.suffix in CAPTIONS and file.with_suffix("") in stems}
        source = [(str(file), file) for file in files if file not in captions]
    elif path.is_file():
        if b"\0" in (content := path.read_bytes()):
            raise ValueError(f"{data}: is not a JSON-lines manifest in UTF-8")
        source = [(f"{data}:{n}", line) for n, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    else:
        raise ValueError(f"{data}: no such data set (want a folder of audio and captions, or a JSON-lines manifest)")
    for name, file in source:
        try:
            caption = None
            if isinstance(file, bytes):  # a line of a manifest, whose paths start at its folder
                location, caption = texts_of(file, "this line", audio_key, caption_key)
                file = path.parent / location
            elif file.suffix in CAPTIONS:
                raise ValueError("is a caption without audio")
            audio_seconds(file)  # asks libsndfile whether this is audio
            caption = caption_beside(file, caption_key) if caption is None else caption
            key = hashlib.sha256()
            with open(file, "rb") as content:
                while part := content.read(2**20):
                    key.update(part)
            entries.append(Entry(str(file), key.hexdigest(), partial(read_blocks, file, sample_rate), caption.strip()))
        except (ValueError, OSError) as error:
            skipped.append((name, str(error)))
    return entries, skipped, len(captions)


def store(path, fresh):
    """The dictionary in the file `path`, to which `fresh` is added; a damaged file is made again, with a word."""
    content = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")) if fresh else nullcontext():
        try:
            content = read_checkpoint(path) if path.is_file() else {}
        except ValueError as error:
            say(f"{error}; it is made again")
        if fresh:
            with whole_file(path) as temporary:
                torch.save(content | fresh, temporary)
    return content | fresh


def fill_cache(path, wanted, make):
    """The dictionary in the file `path`, with the pairs (key, value) added that make(keys) yields for keys not in it.

    They are saved now and then, and at the end, an error or a stop by Ctrl-C or SIGTERM included. Processes may share
    the file: each adds to what the others have written. OSError if it cannot be written, as on a full disk.
    """
    cache, fresh, next_save = store(path, {}), {}, time.monotonic() + SAVE_SECONDS
    try:
        for key, value in make([key for key in wanted if key not in cache]):
            fresh[key] = value
            if (start := time.monotonic()) > next_save:
                cache, fresh = store(path, fresh), {}
                next_save = time.monotonic() + max(SAVE_SECONDS, 10 * (time.monotonic() - start))
    finally:
        cache = store(path, fresh) if fresh else cache
    return cache


def cut_clips(blocks, length):
    """Cut arrays (S,) that follow one another into clips: yield ((length,) float32, how many samples are audio).

    The last clip is padded with zeros. A rest shorter than a tenth of a clip is dropped, unless it is all there is.
    """
    held, count = np.empty(0, np.float32), 0
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) >= length:
            yield held[:length], length
            held, count = held[length:], count + 1
    if len(held) and (not count or len(held) >= length / 10):
        yield np.pad(held, (0, length - len(held))), len(held)


def read_clips(entries, length):
    """Read entries one after another: yield (key, (b, 1, length) of at most `BATCH` clips, how many samples of each are
    audio), and at the end of each entry (key, None, [what is odd about it] or the error that stopped it)."""
    for entry in entries:
        odd, silent, count = [], 0, 0
        try:
            clips = cut_clips(entry.read(odd.append), length)
            while batch := list(itertools.islice(clips, BATCH)):
                wav = torch.from_numpy(np.stack([clip for clip, _ in batch]))[:, None]
                silent, count = silent + int((wav.abs().amax(dim=(1, 2)) < SILENT).sum()), count + len(batch)
                yield entry.key, wav, [n for _, n in batch]
            odd += [f"{silent} of its {count} clips are silent"] if silent else []
            yield entry.key, None, odd if count else ValueError("holds no audio samples")
        except (ValueError, OSError) as error:
            yield entry.key, None, error


def encode_audio(entries, codec, length, device, bad, keys):
    """Yield (key, (codes (n, K, T) int16, n_frames (n,), [what is odd])) of the entries {key: Entry} with these keys;
    bad[key] says why an entry cannot be read. The next clips are read while the codec works on these."""
    batches, codes, samples = read_clips([entries[key] for key in keys], length), [], []
    with ThreadPoolExecutor(1) as reader, tqdm(total=len(keys), desc="encoding audio", disable=not keys) as bar:
        coming = reader.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = reader.submit(next, batches, None)
            key, wav, more = batch
            if wav is not None:
                codes.append(codec.encode(wav.to(device)).cpu().to(torch.int16))
                samples += more
                continue
            if isinstance(more, Exception):
                bad[key] = str(more)
            else:
                yield key, (torch.cat(codes), (torch.tensor(samples) / codec.hop_length).ceil().long(), more)
            codes, samples = [], []
            bar.update()


def encode_captions(encoder, captions, batch=64):
    """Yield (caption, its embedding (L, C) float16)."""
    for i in tqdm(range(0, len(captions), batch), desc="encoding text", disable=not captions):
        part = captions[i:i + batch]
        for caption, row, keep in zip(part, *encoder.encode_text(part), strict=True):
            yield caption, row[keep].half().cpu()


def encode(entries, codec, encoder, seconds, cache_dir="cache", device="cpu"):
    """Fill both caches with what `entries` need -> (the `Clips` of those that can be read, [(name, what is odd)],
    [(name, why it cannot be read)])."""
    length, bad = round(seconds * codec.sample_rate), {}
    if length < 1:
        raise ValueError(f"clips of {seconds:g} s hold no sample")
    by_key = {entry.key: entry for entry in entries}
    audio = fill_cache(Path(cache_dir, f"codes-{fingerprint(codec)}-{codec.n_codebooks}x{length}.pt"), by_key,
                       partial(encode_audio, by_key, codec, length, device, bad))
    good = [(entry, audio[entry.key]) for entry in entries if entry.key not in bad]
    number = {caption: i for i, caption in enumerate(dict.fromkeys(entry.caption for entry, _ in good))}
    text = fill_cache(Path(cache_dir, f"text-{fingerprint(encoder)}.pt"), number, partial(encode_captions, encoder))
    none = torch.empty(0, codec.n_codebooks, math.ceil(length / codec.hop_length), dtype=torch.int16)
    content = json.dumps([(entry.key, entry.caption) for entry, _ in good])
    clips = Clips(
        torch.cat([none, *(value[0] for _, value in good)]), torch.tensor([n for _, value in good for n in value[1]]),
        [text[caption].clone() for caption in number],
        torch.tensor([number[entry.caption] for entry, value in good for _ in value[1]]),
        hashlib.sha256(content.encode()).hexdigest()[:16])
    odd = [(entry.name, note) for entry, value in good for note in (*value, [])[2]]  # old caches have no notes
    return clips, odd, [(entry.name, bad[entry.key]) for entry in entries if entry.key in bad]


def load_data(data, codec, encoder, seconds, cache_dir="cache", audio_key="location", caption_key="main_caption",
              valid_share=0.05, device="cpu", entries=None):
    """Read and encode a data set, a folder or a JSON-lines manifest -> (training `Clips`, validation `Clips`).

    Whole files are held out for validation, each with probability `valid_share` by a hash of its own content: that
    depends on no other file, and holds when the data set grows. Where it picks none, as it may in a small data set, the
    training clips are validated on. entries: (training entries, validation entries) of a data set that is not in files.
    What was skipped and what is odd is said, file by file, and a sum in which all that was found is counted.
    ValueError where nothing can be read.
    """
    skipped, captions, odd = [], 0, []
    if entries is None:
        found, skipped, captions = find_entries(data, audio_key, caption_key, codec.sample_rate)
        held_out = {entry.key for entry in found if int(entry.key[:8], 16) < valid_share * 2**32}
        entries = [[entry for entry in found if (entry.key in held_out) == part] for part in (False, True)]
    parts, n_found = [], sum(map(len, entries)) + captions + len(skipped)
    for part in entries:
        clips, notes, unread = encode(part, codec, encoder, seconds, cache_dir, device)
        parts.append(clips)
        odd += notes
        skipped += unread
    lines = [f"{word} {name}: {text.removeprefix(f'{name}: ')}"
             for word, notes in (("skipped", skipped), ("note:", odd)) for name, text in notes]
    lines += [f"{data}: {n_found} found = {n_found - captions - len(skipped)} encoded + {captions} captions + "
              f"{len(skipped)} skipped; {len(dict(odd))} with a note"]
    for line in lines:
        say(line.encode("utf-8", "backslashreplace").decode())
    train, valid = parts
    n_train, n_valid = len(train.codes), len(valid.codes)
    if not n_train + n_valid:
        raise ValueError(f"{data}: the data set is empty: it holds no audio file with a caption that can be read")
    if not n_train or not n_valid:
        say(f"too few files to hold some out (each is held out with probability {valid_share:g}): "
            "validating on the training clips")
    return train if n_train else valid, valid if n_valid else train
