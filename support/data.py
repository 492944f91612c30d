"""Data sets of captioned audio -> cached codes and text embeddings -> batches.

A data set is a folder of audio files with captions beside them (NAME.txt or NAME.json), a JSON-lines manifest, or lists
of entries. The frozen codec and text encoder see every clip once; training reads only the two cache files.
"""

import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from support.audio import open_audio, read_blocks
from support.cli import say
from support.files import fingerprint, read_checkpoint, save_whole

CAPTIONS = (".txt", ".json")
BATCH = 8  # clips that are encoded together
SILENT = 1e-4  # a clip whose samples all are below -80 dB
SAVE_SECONDS = 120.0  # between two writes of a cache file


@dataclass
class Entry:
    """A recording: `key`, hexadecimal, identifies its samples; `read()` yields them as arrays (S,) float32, mono, at
    the codec's rate; it may raise ValueError or OSError."""

    name: str
    key: str
    read: Callable
    caption: str


@dataclass
class Clips:
    """Encoded clips. Data sets differ by their `fingerprint`, a hash of keys and captions."""

    codes: torch.Tensor  # (n, K, T) int16
    n_frames: torch.Tensor  # (n,) how many of the T frames are not padding
    text: list  # a float16 tensor (L, C) per distinct caption, L = 0 for an empty one
    caption: torch.Tensor  # (n,) index into text
    fingerprint: str = ""

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


def texts_of(content, *keys):
    """The texts under some keys of the JSON record that the bytes `content` hold. ValueError, RecursionError."""
    record = json.loads(content)
    for key in keys:
        if not isinstance(record, dict) or not isinstance(record.get(key), str):
            raise ValueError(f"no text under the key {key!r}")
    return [record[key] for key in keys]


def caption_beside(path, caption_key):
    """The caption of an audio file in NAME.txt, or in NAME.json under `caption_key`. ValueError: there is none."""
    text, record = map(path.with_suffix, CAPTIONS)
    if not text.is_file() and not record.is_file():
        raise ValueError(f"has no caption; want {text.name} or {record.name} beside it")
    try:
        return text.read_text("utf-8-sig") if text.is_file() else texts_of(record.read_bytes(), caption_key)[0]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its caption cannot be read: {error}") from error


def find_entries(data, audio_key, caption_key, sample_rate):
    """(entries, [(name, why it is skipped)], number of captions) of a folder or a JSON-lines manifest: all it holds."""
    path, entries, skipped, captions = Path(data), [], [], set()
    if path.is_dir():
        walk = list(os.walk(path, onerror=lambda error: skipped.append((error.filename, error.strerror))))
        files = sorted(Path(parent, name) for parent, _, names in walk for name in names)
        folders = [Path(parent, name) for parent, names, _ in walk for name in names]
        skipped += [(folder, "is a link to a folder") for folder in folders if folder.is_symlink()]  # not followed
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
                location, caption = texts_of(file, audio_key, caption_key)
                file = path.parent / location
            elif file.suffix in CAPTIONS:
                raise ValueError("is a caption without audio")
            open_audio(file).close()  # asks libsndfile whether this is audio
            caption = caption_beside(file, caption_key) if caption is None else caption
            caption.encode()  # ValueError: half a character, which no text encoder takes
            key = hashlib.sha256(np.memmap(file, mode="r")).hexdigest()
            entries.append(Entry(str(file), key, partial(read_blocks, file, sample_rate), caption.strip()))
        except (ValueError, OSError, RecursionError) as error:
            skipped.append((name, str(error)))
    return entries, skipped, len(captions)


def fill_cache(path, wanted, make):
    """The dictionary in the file `path`, with the pairs (key, value) added that make(keys) yields for keys not in it.
    They are saved every two minutes, and at the end, an error or a stop by Ctrl-C or SIGTERM included. Processes may
    share the file: one fills it while the others wait. A damaged file is made again, with a word."""
    cache, saved = {}, time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        try:
            cache = read_checkpoint(path) if path.is_file() else {}
        except ValueError as error:
            say(f"{error}; it is made again")
        n_saved = len(cache)
        try:
            for key, value in make([key for key in wanted if key not in cache]):
                cache[key] = value
                if time.monotonic() - saved > SAVE_SECONDS:
                    save_whole(cache, path)
                    n_saved, saved = len(cache), time.monotonic()
        finally:
            if len(cache) > n_saved:
                save_whole(cache, path)
    return cache


def cut_clips(blocks, length):
    """Cut arrays (S,) that follow one another into clips: yield ((length,) float32, how many samples are audio). The
    last is padded; a rest shorter than a tenth of a clip is dropped, unless it is all there is. ValueError: nothing."""
    held, count = np.empty(0, np.float32), 0
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) >= length:
            yield held[:length], length
            held, count = held[length:], count + 1
    if len(held) and (not count or len(held) >= length / 10):
        yield np.pad(held, (0, length - len(held))), len(held)
    elif not count:
        raise ValueError("holds no audio samples")


def encode_audio(entries, codec, length, device, bad, keys):
    """Yield (key, (codes (n, K, T) int16, n_frames (n,))) of the entries {key: Entry} with these keys; bad[key] says
    why one cannot be read. The first clips of the next one are read while the codec works."""
    def begin(key):
        clips = cut_clips(entries[key].read(), length)
        return itertools.chain(list(itertools.islice(clips, BATCH)), clips)

    with ThreadPoolExecutor(1) as reader:
        reading = map(partial(reader.submit, begin), keys)  # each is begun when it is asked for
        coming = next(reading, None)
        for key in tqdm(keys, desc="encoding audio", disable=not keys):
            ready, coming, codes, n_frames, silent = coming, next(reading, None), [], [], 0
            try:
                clips = ready.result()
                while batch := list(itertools.islice(clips, BATCH)):
                    wav = torch.from_numpy(np.stack([clip for clip, _ in batch]))[:, None].to(device)
                    codes.append(codec.encode(wav).cpu().to(torch.int16))
                    n_frames += [math.ceil(n / codec.hop_length) for _, n in batch]
                    silent += int((wav.abs().amax(dim=(1, 2)) < SILENT).sum())
            except (ValueError, OSError) as error:
                bad[key] = str(error)
            else:
                if silent:  # as stereo is whose channels cancel each other out
                    say(f"note: {entries[key].name}: {silent} of its {len(n_frames)} clips are silent in mono")
                yield key, (torch.cat(codes), torch.tensor(n_frames))


def encode_captions(encoder, captions, batch=64):
    """Yield (caption, its embedding (L, C) float16)."""
    for i in tqdm(range(0, len(captions), batch), desc="encoding text", disable=not captions):
        part = captions[i:i + batch]
        for caption, row, keep in zip(part, *encoder.encode_text(part), strict=True):
            yield caption, row[keep].half().cpu()


def encode(entries, codec, encoder, seconds, cache_dir="cache", device="cpu"):
    """Fill both caches with what `entries` need -> (the `Clips` of those that can be read, [(name, why it cannot be
    read)] of the others)."""
    length, bad = max(1, round(seconds * codec.sample_rate)), {}
    by_key = {entry.key: entry for entry in entries}
    audio = fill_cache(Path(cache_dir, f"codes-{fingerprint(codec)}-{codec.n_codebooks}x{length}.pt"), by_key,
                       partial(encode_audio, by_key, codec, length, device, bad))
    good = [(entry.key, entry.caption) for entry in entries if entry.key not in bad]
    number = {caption: i for i, caption in enumerate(dict.fromkeys(caption for _, caption in good))}
    text = fill_cache(Path(cache_dir, f"text-{fingerprint(encoder)}.pt"), number, partial(encode_captions, encoder))
    none = torch.empty(0, codec.n_codebooks, math.ceil(length / codec.hop_length), dtype=torch.int16)
    n_frames = torch.cat([torch.empty(0), *(audio[key][1] for key, _ in good)]).long()
    clips = Clips(torch.cat([none, *(audio[key][0] for key, _ in good)]), n_frames, [text[x].clone() for x in number],
                  torch.tensor([number[caption] for key, caption in good for _ in audio[key][1]]),
                  hashlib.sha256(json.dumps(good).encode()).hexdigest()[:16])
    return clips, [(entry.name, bad[entry.key]) for entry in entries if entry.key in bad]


def load_data(data, codec, encoder, seconds, cache_dir="cache", audio_key="location", caption_key="main_caption",
              valid_share=0.05, device="cpu", entries=None):
    """Read and encode a folder, a manifest, or two lists of entries -> (training `Clips`, validation `Clips`).

    Whole files are held out for validation, each with probability `valid_share` by a hash of its own content: that
    depends on no other file, and holds when the data set grows. Where none is, the training clips are validated on.
    What was skipped is said, and a sum in which all that was found is counted. ValueError where nothing can be read."""
    skipped, captions = [], 0
    if entries is None:
        found, skipped, captions = find_entries(data, audio_key, caption_key, codec.sample_rate)
        entries = [[entry for entry in found if (int(entry.key[:8], 16) < valid_share * 2**32) == held_out]
                   for held_out in (False, True)]
    n_found = sum(map(len, entries)) + captions + len(skipped)
    (train, unread), (valid, more) = (encode(part, codec, encoder, seconds, cache_dir, device) for part in entries)
    skipped += unread + more
    for name, why in skipped:
        say(f"skipped {name}: {why.removeprefix(f'{name}: ')}".encode("utf-8", "backslashreplace").decode())
    say(f"{data}: {n_found} found = {n_found - captions - len(skipped)} encoded + {captions} captions + "
        f"{len(skipped)} skipped")
    n_train, n_valid = len(train.codes), len(valid.codes)
    if not n_train + n_valid:
        raise ValueError(f"{data}: the data set is empty: it holds no audio file with a caption that can be read")
    if not n_train or not n_valid:
        say(f"too few files to hold some out (each is held out with probability {valid_share:g}): "
            "validating on the training clips")
    return train if n_train else valid, valid if n_valid else train
