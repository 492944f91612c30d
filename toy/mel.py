"""Log-mel spectrograms: how the toy world's codec is trained to hear, in plain torch."""

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
