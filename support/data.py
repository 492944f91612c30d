"""Data sets of captioned audio -> cached codes and text embeddings -> batches.

A data set is a folder of audio files with captions beside them (NAME.txt or NAME.json), a JSON-lines manifest, or lists
of entries. The frozen codec and text encoder, which are handed in, see every clip once; what they give is kept in two
cache files, and training reads only that. It leaves out what large data sets need: shards, augmentation.
"""

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock  # which torch itself needs
from tqdm import tqdm

from support.audio import audio_seconds, read_blocks
from support.cli import say
from support.files import fingerprint, read_checkpoint, save_whole

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

    def valid(self, rows):
        """(B, T) bool, False at the padding that fills short clips."""
        return torch.arange(self.codes.shape[2]) < self.n_frames[rows, None]

    def batch(self, rows, device="cpu"):
        """rows: (B,) long -> codes (B, K, T) long, text (B, L, C) float32, text_mask (B, L) float32."""
        texts = [self.text[i] for i in self.caption[rows]]
        text = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).float()
        if not text.shape[1]:  # only empty captions: one masked place, so that there is something to attend to
            text = text.new_zeros(len(texts), 1, text.shape[2])
        lengths = torch.tensor([len(t) for t in texts])
        text_mask = (torch.arange(text.shape[1]) < lengths[:, None]).float()
        return self.codes[rows].long().to(device), text.to(device), text_mask.to(device)


# -------------------------------------------------------------------------------------------------------------- sources
# A source is a list of (name, look): look() gives the path of an audio file and its caption, or raises ValueError.

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


def look_beside(path, caption_key):
    """(path, caption) of an audio file with NAME.txt, or NAME.json with `caption_key`, beside it."""
    if path.suffix in CAPTIONS:
        raise ValueError("is a caption without audio")
    audio_seconds(path)  # asks libsndfile whether this is audio
    text, record = map(path.with_suffix, CAPTIONS)
    if text.is_file():
        try:
            return path, text.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"its caption {text} is not UTF-8; save it in this encoding") from error
    if record.is_file():
        return path, *texts_of(record.read_bytes(), f"its caption {record}", caption_key)
    raise ValueError(f"has no caption; want {text.name} or {record.name} beside it")


def look_in(line, folder, audio_key, caption_key):
    """(path, caption) of a manifest's line; a relative path starts at `folder`."""
    location, caption = texts_of(line, "this line", audio_key, caption_key)
    audio_seconds(path := folder / location)
    return path, caption


def files_below(folder, skipped):
    """All files in a folder and its sub-folders, in order. Links are followed, but into no folder a second time."""
    def unreadable(error):
        skipped.append((error.filename, f"is a folder that cannot be read ({error.strerror})"))

    files, seen = [], {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        for name in sorted(folders):
            real = os.path.realpath(path := os.path.join(parent, name))
            if real in seen or Path(real) in Path(os.path.realpath(parent)).parents:
                folders.remove(name)
                skipped.append((path, "links to a folder that is read in another place"))
            seen.add(real)
        folders.sort()
        files += [Path(parent, name) for name in names]
    return sorted(files)


def find_entries(data, audio_key, caption_key, sample_rate):
    """(entries, [(name, why it is skipped)], number of captions) of a folder or a JSON-lines manifest: all it holds."""
    path, entries, skipped, captions = Path(data), [], [], set()
    if path.is_dir():
        files = files_below(path, skipped)
        stems = {file.with_suffix("") for file in files if file.suffix not in CAPTIONS}
        captions = {file for file in files if file.suffix in CAPTIONS and file.with_suffix("") in stems}
        source = [(str(file), partial(look_beside, file, caption_key)) for file in files if file not in captions]
    elif path.is_file():
        if b"\0" in (content := path.read_bytes()):
            raise ValueError(f"{data}: is not a JSON-lines manifest in UTF-8")
        source = [(f"{data}:{number}", partial(look_in, line, path.parent, audio_key, caption_key))
                  for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    else:
        raise ValueError(f"{data}: no such data set (want a folder of audio and captions, or a JSON-lines manifest)")
    for name, look in source:
        try:
            file, caption = look()
            with open(file, "rb") as content:
                key = hashlib.sha256()
                while part := content.read(2**20):
                    key.update(part)
            entries.append(Entry(str(file), key.hexdigest(), partial(read_blocks, file, sample_rate), caption.strip()))
        except (ValueError, OSError) as error:
            skipped.append((name, str(error)))
    return entries, skipped, len(captions)


# ------------------------------------------------------------------------------------------------------------- encoding

def read_cache(path):
    """The dictionary in the file `path`; a damaged one is left out with a word, and made again."""
    try:
        content = read_checkpoint(path) if path.is_file() else {}
        if isinstance(content, dict):
            return content
        raise ValueError(f"{path}: is no cache")
    except ValueError as error:
        say(f"{error}; it is made again")
        return {}


def fill_cache(path, wanted, make):
    """The dictionary in the file `path`, with the pairs (key, value) added that make(keys) yields for keys not in it.

    They are saved now and then, and at the end, an error or a stop by Ctrl-C or SIGTERM included. Processes may share
    the file: each adds to what the others have written. OSError if it cannot be written, as on a full disk.
    """
    cache, fresh, next_save = read_cache(path), {}, time.monotonic() + SAVE_SECONDS

    def save():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            save_whole(cache | read_cache(path) | fresh, path)

    try:
        for key, value in make([key for key in wanted if key not in cache]):
            cache[key] = fresh[key] = value
            if (start := time.monotonic()) > next_save:
                save()
                next_save = time.monotonic() + max(SAVE_SECONDS, 10 * (time.monotonic() - start))
    finally:
        if fresh:
            save()
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


def encode_entry(entry, codec, length, device):
    """(codes (n, K, T) int16, n_frames (n,), [what is odd]) of an entry, which is read a few clips at a time."""
    codes, samples, silent, odd = [], [], 0, []
    clips = cut_clips(entry.read(odd.append), length)
    while batch := list(itertools.islice(clips, BATCH)):
        wav = torch.from_numpy(np.stack([clip for clip, _ in batch]))[:, None]  # (b, 1, length)
        codes.append(codec.encode(wav.to(device)).cpu().to(torch.int16))
        samples += [n for _, n in batch]
        silent += int((wav.abs().amax(dim=(1, 2)) < SILENT).sum())
    if not codes:
        raise ValueError("holds no audio samples")
    odd += [f"{silent} of its {len(samples)} clips are silent"] if silent else []
    return torch.cat(codes), (torch.tensor(samples) / codec.hop_length).ceil().long(), odd


def encode_audio(entries, codec, length, device, bad, keys):
    """Yield (key, `encode_entry`'s result) of the entries {key: Entry} with these keys; bad[key] says what is wrong."""
    for key in tqdm(keys, desc="encoding audio", disable=not keys):
        try:
            value = encode_entry(entries[key], codec, length, device)
        except (ValueError, OSError) as error:
            bad[key] = str(error)
        else:
            yield key, value


def encode_captions(encoder, captions, batch=64):
    """Yield (caption, its embedding (L, C) float16)."""
    for i in tqdm(range(0, len(captions), batch), desc="encoding text", disable=not captions):
        part = captions[i:i + batch]
        for caption, row, keep in zip(part, *encoder.encode_text(part), strict=True):
            yield caption, row[keep].half().cpu()


def encode(entries, codec, encoder, seconds, cache_dir="cache", device="cpu"):
    """Fill both caches with what `entries` need -> (audio by key, text by caption, {key: why it cannot be read})."""
    length, bad = round(seconds * codec.sample_rate), {}
    if length < 1:
        raise ValueError(f"clips of {seconds:g} s hold no sample")
    by_key = {entry.key: entry for entry in entries}
    audio = fill_cache(Path(cache_dir, f"codes-{fingerprint(codec)}-{codec.n_codebooks}x{length}.pt"), by_key,
                       partial(encode_audio, by_key, codec, length, device, bad))
    captions = dict.fromkeys(entry.caption for entry in entries if entry.key in audio)
    text = fill_cache(Path(cache_dir, f"text-{fingerprint(encoder)}.pt"), captions, partial(encode_captions, encoder))
    return audio, text, bad


def collect(entries, audio, text):
    """The `Clips` of some entries, from what `encode` gave."""
    captions = list(dict.fromkeys(entry.caption for entry in entries))
    number = {caption: i for i, caption in enumerate(captions)}
    codes, n_frames = zip(*(audio[entry.key][:2] for entry in entries), strict=True)
    content = json.dumps([(entry.key, entry.caption) for entry in entries])
    return Clips(
        torch.cat(codes), torch.cat(n_frames), [text[caption].clone() for caption in captions],
        torch.cat([torch.full((len(c),), number[e.caption]) for c, e in zip(codes, entries, strict=True)]),
        hashlib.sha256(content.encode()).hexdigest()[:16])


def report(data, entries, audio, skipped, captions):
    """Say what was skipped and what is odd, file by file, and a sum in which all that was found is counted."""
    odd = [(entry.name, text) for entry in entries for text in (*audio[entry.key], [])[2]]  # old caches have no notes
    lines = [f"{word} {name}: {text.removeprefix(f'{name}: ')}"
             for word, notes in (("skipped", skipped), ("note:", odd)) for name, text in notes]
    lines += [f"{data}: {len(entries) + captions + len(skipped)} found = {len(entries)} encoded + {captions} captions "
              f"+ {len(skipped)} skipped; {len(dict(odd))} with a note"]
    for line in lines:
        say(line.encode("utf-8", "backslashreplace").decode())


def load_data(data, codec, encoder, seconds, cache_dir="cache", audio_key="location", caption_key="main_caption",
              valid_share=0.05, device="cpu", entries=None):
    """Read and encode a data set, a folder or a JSON-lines manifest -> (training `Clips`, validation `Clips`).

    Whole files are held out for validation, each with probability `valid_share` by a hash of its own content: that
    depends on no other file, and holds when the data set grows. Where it picks none, as it may in a small data set, the
    training clips are validated on. entries: (training entries, validation entries) of a data set that is not in files.
    ValueError where nothing can be read.
    """
    skipped, captions = [], 0
    if entries is None:
        found, skipped, captions = find_entries(data, audio_key, caption_key, codec.sample_rate)
        held_out = {entry.key for entry in found if int(entry.key[:8], 16) < valid_share * 2**32}
        entries = [[entry for entry in found if (entry.key in held_out) == part] for part in (False, True)]
    audio, text, bad = encode([*entries[0], *entries[1]], codec, encoder, seconds, cache_dir, device)
    skipped += [(entry.name, bad[entry.key]) for part in entries for entry in part if entry.key in bad]
    train, valid = ([entry for entry in part if entry.key in audio] for part in entries)
    report(data, train + valid, audio, skipped, captions)
    if not train + valid:
        raise ValueError(f"{data}: the data set is empty: it holds no audio file with a caption that can be read")
    if not train or not valid:
        say(f"too few files to hold some out (each is held out with probability {valid_share:g}): "
            "validating on the training clips")
    return collect(train or valid, audio, text), collect(valid or train, audio, text)
