"""How the codecs and the judges hear: log-mel spectrograms, pitch profiles and onsets, in plain torch."""

from functools import lru_cache

import torch


@lru_cache
@torch.inference_mode(False)  # what is kept may first be wanted by the judge, and later in training
def mel_filters(sample_rate, n_fft, n_mels):
    """Triangular filters, evenly spaced on the mel scale: (n_fft // 2 + 1, n_mels)."""
    top = 2595 * torch.log10(torch.tensor(1 + sample_rate / 2 / 700))
    edges = 700 * (10 ** (torch.linspace(0, top.item(), n_mels + 2) / 2595) - 1)  # Hz
    hertz = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1)[:, None]
    up = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    return torch.minimum(up, down).clamp(min=0)


def mel_spectrogram(wav, sample_rate, n_fft=1024, hop=256, n_mels=64):
    """Audio (B, S) -> magnitudes on the mel scale (B, n_mels, frames)."""
    window = torch.hann_window(n_fft, device=wav.device)
    spectrum = torch.stft(wav, n_fft, hop, window=window, return_complex=True, normalized=True).abs()
    mel = spectrum.transpose(1, 2) @ mel_filters(sample_rate, n_fft, n_mels).to(wav.device)
    return mel.transpose(1, 2)


def log_mel(mel, floor=1e-2):
    """Natural logarithm of mel magnitudes; what is below `floor` (about 50 dB under a loud note) counts as silence."""
    return mel.clamp(min=floor).log()


@lru_cache
@torch.inference_mode(False)
def pitch_filters(sample_rate, n_fft, lowest=41.2, per_octave=36, octaves=6):
    """Triangular filters a third of a semitone apart, from `lowest` Hz (E1) on: (n_fft // 2 + 1, filters)."""
    hertz = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1)[:, None].clamp(min=1)
    centres = lowest * 2 ** (torch.arange(per_octave * octaves) / per_octave)
    return (1 - (12 * torch.log2(hertz / centres)).abs() / 0.6).clamp(min=0)


def pitch_profile(wav, sample_rate, n_fft=4096, hop=1600):
    """Audio (B, S) -> how much of each pitch sounds, over the whole clip: (B, 6 octaves, 36 thirds of a semitone)."""
    window = torch.hann_window(n_fft, device=wav.device)
    spectrum = torch.stft(wav, n_fft, hop, window=window, return_complex=True).abs()  # (B, bins, frames)
    levels = spectrum.transpose(1, 2) @ pitch_filters(sample_rate, n_fft).to(wav.device)
    loudest = levels.amax(dim=(1, 2), keepdim=True).clamp(min=1e-6)
    return torch.log1p(20 * levels / loudest).mean(dim=1).unflatten(1, (6, 36))


def onset_bands(wav, sample_rate, n_fft=512, hop=160, edges=(4, 10, 20, 40, 80, 140)):
    """Audio (B, S) -> how levels rise, and the levels, in 7 bands of frequency: (B, 14, frames), one in 10 ms."""
    window = torch.hann_window(n_fft, device=wav.device)
    spectrum = torch.stft(wav, n_fft, hop, window=window, return_complex=True).abs()[:, 1:]
    bands = torch.stack([part.sum(dim=1) for part in spectrum.tensor_split(edges, dim=1)], dim=1)  # (B, 7, frames)
    levels = (bands + 1e-2 * bands.amax(dim=(1, 2), keepdim=True).clamp(min=1e-6)).log()
    rises = torch.nn.functional.pad((levels[..., 2:] - levels[..., :-2]).clamp(min=0), (1, 1))
    return torch.cat([rises, levels - levels.mean(dim=(1, 2), keepdim=True)], dim=1)
