"""Captioned audio -> cached codes and text embeddings -> batches.

A data set is a folder of audio files with same-named .txt or .json captions, a JSON-lines manifest, or the toy world.
The frozen codec and text encoder see every clip once; what they say is kept in two cache files and training reads only
that. It leaves out what large data sets need: streaming, shards, augmentation.

    python data.py my_music --codec encodec_24khz --text-encoder t5-base --seconds 10  # only fills the cache
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from cli import Parser, identities, pick_device, run, save_whole
from encodec_wrap import load_audio, load_codec
from t5_encoder import T5Encoder

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".opus")
SAVE_EVERY = 1000  # new cache entries between two writes of a cache file
VALIDATION_SHARE = 0.05
VALIDATED_FROM = 10  # different files on, at least one is held out


@dataclass
class Clips:
    """Encoded clips. codes: (n, K, T) int16; n_frames: (n,) how many of the T frames are not padding; text: one float16
    tensor (N, D) per distinct caption, N = 0 for an empty one; caption: (n,) index into it."""

    codes: torch.Tensor
    n_frames: torch.Tensor
    text: list
    caption: torch.Tensor

    def __len__(self):
        return len(self.codes)

    def valid(self, rows):
        """(B, T) bool, False at the padding that fills short clips."""
        return torch.arange(self.codes.shape[2]) < self.n_frames[rows, None]

    def batch(self, rows, device="cpu"):
        """rows: (B,) long -> codes (B, K, T) long, text (B, N, D) float32, text_mask (B, N) float32."""
        texts = [self.text[i] for i in self.caption[rows]]
        text = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).float()
        if not text.shape[1]:  # only empty captions: one masked place, so that there is something to attend to
            text = text.new_zeros(len(texts), 1, text.shape[2])
        lengths = torch.tensor([len(t) for t in texts])
        text_mask = (torch.arange(text.shape[1]) < lengths[:, None]).float()
        return self.codes[rows].long().to(device), text.to(device), text_mask.to(device)


# -------------------------------------------------------------------------------------------------------------- sources
# A source is a list of (name, key, read, caption): `key` identifies the audio's content, `read()` gives it as (1, S).

def read_caption(audio_path, caption_key):
    """The caption beside an audio file: NAME.txt, or NAME.json with `caption_key`. ValueError if there is none."""
    text, record = audio_path.with_suffix(".txt"), audio_path.with_suffix(".json")
    if text.is_file():
        return text.read_text(encoding="utf-8-sig").strip()
    if record.is_file():
        return caption_of(json.loads(record.read_text(encoding="utf-8-sig")), caption_key)
    raise ValueError(f"no caption: want {text.name} or {record.name} beside it")


def caption_of(record, caption_key):
    if not isinstance(record, dict) or not isinstance(record.get(caption_key), str):
        raise ValueError(f"no text under the key {caption_key!r}")
    return record[caption_key].strip()


def audio_source(path, caption, sample_rate):
    """A source entry for an audio file; ValueError if it is missing."""
    if not path.is_file():
        raise ValueError("no such audio file")
    return str(path), hashlib.sha256(path.read_bytes()).hexdigest(), lambda: load_audio(path, sample_rate), caption


def folder_sources(folder, caption_key, sample_rate):
    """(entries, bad) of a folder, searched with its sub-folders; `bad` lists (name, what was wrong)."""
    entries, bad = [], []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES):
        try:
            entries.append(audio_source(path, read_caption(path, caption_key), sample_rate))
        except (ValueError, OSError) as error:
            bad.append((str(path), str(error)))
    return entries, bad


def manifest_sources(manifest, audio_key, caption_key, sample_rate):
    """(entries, bad) of a JSON-lines manifest; relative audio paths start at the manifest's folder."""
    entries, bad = [], []
    try:
        lines = manifest.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{manifest}: is not a JSON-lines manifest (no text)") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            caption = caption_of(record, caption_key)
            if not isinstance(record.get(audio_key), str):
                raise ValueError(f"no path under the key {audio_key!r}")
            entries.append(audio_source(manifest.parent / record[audio_key], caption, sample_rate))
        except (ValueError, OSError) as error:
            bad.append((f"{manifest}:{number}", str(error)))
    return entries, bad


def toy_sources(n_clips, split, seconds, seed=0):
    """Entries of the toy world; the key holds a hash of its source, so that a changed world is encoded anew."""
    from toy import world
    version = hashlib.sha256(Path(world.__file__).read_bytes()).hexdigest()
    entries = []
    for i in range(n_clips):
        def play(i=i):
            return torch.from_numpy(world.example(i, split, seed, seconds)[0])[None]
        entries.append((f"toy {split} {i}", f"{version}-{split}-{seed}-{i}", play, world.describe(i, split, seed)[1]))
    return entries


# ------------------------------------------------------------------------------------------------------------- encoding

def cut_clips(wav, length):
    """Audio (1, S) -> clips (n, 1, length) and the samples that are audio in each (n,); the last is padded with zeros.

    A rest shorter than a tenth of a clip is dropped, unless it is all there is.
    """
    samples = wav.shape[1]
    if samples > length and samples % length < length / 10:
        wav = wav[:, :samples - samples % length]
    n = -(-wav.shape[1] // length)
    padded = torch.nn.functional.pad(wav, (0, n * length - wav.shape[1]))
    return padded.view(n, 1, length), (wav.shape[1] - torch.arange(n) * length).clamp(max=length)


def load_cache(path):
    """A cache file's entries; a damaged one is left out with a word, and made again."""
    try:
        return torch.load(path, weights_only=True) if path.is_file() else {}
    except Exception:  # torch.load has no one type for a damaged file
        print(f"{path} is damaged and will be made again")
        return {}


def encode_audio(entries, codec, seconds, path, device):
    """Codes of all entries, by key: {key: (codes (n, K, T) int16, n_frames (n,))}, through the cache file `path`.

    Also gives the list of (name, what was wrong) for audio that cannot be read.
    """
    cache, bad, fresh = load_cache(path), [], 0
    length = round(seconds * codec.sample_rate)
    todo = [entry for entry in entries if entry[1] not in cache]
    try:
        for name, key, read, _ in tqdm(todo, desc="encoding audio", disable=not todo):
            try:
                clips, samples = cut_clips(read(), length)
            except (ValueError, OSError) as error:
                bad.append((name, str(error)))
                continue
            codes = torch.cat([codec.encode(clip.to(device)).cpu() for clip in clips.split(8)])
            cache[key] = (codes.to(torch.int16), (samples / codec.hop_length).ceil().long())
            fresh += 1
            if fresh % SAVE_EVERY == 0:
                save_whole(cache, path)
    finally:  # a stop half-way keeps what is done
        if fresh % SAVE_EVERY:
            save_whole(cache, path)
    return cache, bad


def encode_captions(captions, encoder, path):
    """Text embeddings of distinct captions, {caption: (N, D) float16}, through the cache file `path`."""
    cache, batch = load_cache(path), 64
    todo = [caption for caption in captions if caption not in cache]
    for i in tqdm(range(0, len(todo), batch), desc="encoding text", disable=not todo):
        embeddings, mask = encoder.encode_text(todo[i:i + batch])
        for caption, row, keep in zip(todo[i:i + batch], embeddings, mask, strict=True):
            cache[caption] = row[keep].half().cpu()
    if todo:
        save_whole(cache, path)
    return cache


def encode(entries, bad, codec, encoder, seconds, cache_dir, device="cpu"):
    """Fill both caches with all that `entries` need, and report what is bad: -> (codes by key, text by caption)."""
    cache_dir = Path(cache_dir)
    ids, samples = identities(codec, encoder), round(seconds * codec.sample_rate)
    codes_path = cache_dir / f"codes-{ids['codec_id']}-{codec.n_codebooks}x{samples}.pt"
    codes, unreadable = encode_audio(entries, codec, seconds, codes_path, device)
    captions = list(dict.fromkeys(caption for _, key, _, caption in entries if key in codes))
    text = encode_captions(captions, encoder, cache_dir / f"text-{ids['text_encoder_id']}.pt")
    bad = bad + unreadable
    for name, problem in bad:
        print(f"skipped {name}: {problem}")
    if bad:
        print(f"skipped {len(bad)} of {len(entries) + len(bad) - len(unreadable)} files")
    return codes, text


def collect(entries, codes, text):
    """The `Clips` of some entries, from what `encode` gave."""
    captions = list(dict.fromkeys(caption for _, _, _, caption in entries))
    number = {caption: i for i, caption in enumerate(captions)}
    pieces = [(*codes[key], number[caption]) for _, key, _, caption in entries]
    return Clips(
        torch.cat([c for c, _, _ in pieces]), torch.cat([n for _, n, _ in pieces]),
        [text[caption] for caption in captions],
        torch.cat([torch.full((len(c),), i) for c, _, i in pieces]))


def load_data(data, codec, encoder, seconds, cache_dir="cache", audio_key="location", caption_key="main_caption",
              toy_clips=6000, device="cpu"):
    """Read a data set: a folder, a JSON-lines manifest, or "toy" -> (training `Clips`, validation `Clips`).

    Whole files are held out for validation, chosen by their content, at least one of ten or more; of the toy world
    fresh clips are drawn. A smaller data set is validated on itself. ValueError where nothing can be read.
    """
    path = Path(data)
    if not round(seconds * codec.sample_rate) >= 1:
        raise ValueError(f"--seconds must be above 0, not {seconds}")
    if data == "toy":
        train, valid = toy_sources(toy_clips, "train", seconds), toy_sources(max(1, toy_clips // 20), "valid", seconds)
        bad = []
    elif path.is_dir():
        train, bad = folder_sources(path, caption_key, codec.sample_rate)
    elif path.is_file():
        train, bad = manifest_sources(path, audio_key, caption_key, codec.sample_rate)
    else:
        raise ValueError(f"{data}: no such data set (want a folder, a JSON-lines manifest, or toy)")
    if data != "toy":
        keys = {key for _, key, _, _ in train}
        held_out = {key for key in keys if int(key[:8], 16) < VALIDATION_SHARE * 2**32}
        if not held_out and len(keys) >= VALIDATED_FROM:
            held_out = {min(keys)}
        valid = [entry for entry in train if entry[1] in held_out]
        train = [entry for entry in train if entry[1] not in held_out]
    codes, text = encode(train + valid, bad, codec, encoder, seconds, cache_dir, device)
    train, valid = ([entry for entry in part if entry[1] in codes] for part in (train, valid))
    if not train + valid:
        raise ValueError(f"{data}: the data set is empty: no audio file ({', '.join(AUDIO_SUFFIXES)}) with a caption "
                         "could be read")
    if not train or not valid:
        print("too few files to hold some out: validating on the training clips")
    return collect(train or valid, codes, text), collect(valid or train, codes, text)


def main():
    parser = Parser(description="encode a data set into the cache")
    parser.add_argument("data", help="a folder, a JSON-lines manifest, or toy")
    parser.add_argument("--codec", default="toy")
    parser.add_argument("--n-codebooks", type=int, default=0)
    parser.add_argument("--text-encoder", default="toy")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--cache", default="cache")
    parser.add_argument("--audio-key", default="location")
    parser.add_argument("--caption-key", default="main_caption")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    codec = load_codec(args.codec, args.n_codebooks or None, device)
    encoder = T5Encoder.from_pretrained(args.text_encoder).to(device)
    train, valid = load_data(args.data, codec, encoder, args.seconds, args.cache, args.audio_key, args.caption_key,
                             device=device)
    print(f"{len(train)} training clips and {len(valid)} validation clips of {args.seconds:g} s")


if __name__ == "__main__":
    run(main)
