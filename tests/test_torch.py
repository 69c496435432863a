"""PyTorch modules as networks: taps and logits found, adaptation, modules that come out, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from instantft import DataError, FineTuner, MismatchError, UsageError, from_torch
from instantft.adapters import Adapter
from instantft.backbones.builtin import Network
from instantft.backbones.torch import TOLERANCE, TorchNetwork
from instantft.cli import run as command_line
from instantft.engine import get_engine

from .nets import NETS, samples_for, tensors_for

pytest.importorskip("torch", reason="PyTorch is an extra: pip install 'instantft[torch]'")
import torch
from torch import nn
from torch.nn import functional

Array = NDArray[Any]
C = 5

# -- networks in the manner of torchvision, timm and transformers ----------------------------------------------------


class Block(nn.Module):
    """torchvision's: ReLU in place, added to in place."""

    def __init__(self, n: int, m: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n, m, 3, stride, 1, bias=False), nn.BatchNorm2d(m)
        self.conv2, self.bn2 = nn.Conv2d(m, m, 3, 1, 1, bias=False), nn.BatchNorm2d(m)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(n, m, 1, stride, bias=False), nn.BatchNorm2d(m))

    def forward(self, x: Any) -> Any:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        return self.relu(out)


class TorchvisionStyle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.layer1, self.layer2 = nn.Sequential(Block(8, 8)), nn.Sequential(Block(8, 12, 2))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(12, C))

    def forward(self, x: Any) -> Any:
        x = self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))
        return self.classifier(torch.flatten(self.avgpool(x), 1))


class Squeeze(nn.Module):
    """timm's squeeze and excitation: weights of channels."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(n, 4, 1), nn.Conv2d(4, n, 1)

    def forward(self, x: Any) -> Any:
        return x * torch.sigmoid(self.fc2(functional.silu(self.fc1(x.mean((2, 3), keepdim=True)))))


class Attention(nn.Module):
    def __init__(self, n: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(n, 3 * n), nn.Linear(n, n)

    def forward(self, x: Any) -> Any:
        B, P, F = x.shape
        q, k, v = self.qkv(x).reshape(B, P, 3, self.heads, F // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        return self.proj(x.transpose(1, 2).reshape(B, P, F))


class TimmStyle(nn.Module):
    """A hybrid: stem, squeeze and excitation, tokens with a class token, pre-norm attention, and probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0, self.se = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), Squeeze(8)
        self.embed = nn.Conv2d(8, 16, 4, 4)
        self.cls, self.pos = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(torch.randn(1, 17, 16) * 0.02)
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(16), Attention(16), nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 16))
        self.head_norm, self.head = nn.LayerNorm(16), nn.Linear(16, C)

    def forward_features(self, x: Any) -> Any:
        x = self.embed(self.se(functional.relu(self.norm0(self.stem(x)), inplace=True)))
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1) + self.pos
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def forward(self, x: Any) -> Any:
        return self.head(self.head_norm(self.forward_features(x)[:, 0])).softmax(-1)


def transformer(kind: str) -> Any:
    tf = pytest.importorskip("transformers", reason="these networks are built from configs of transformers")
    vit = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**vit, "vocab_size": 40, "max_position_embeddings": 16}
    if kind == "ResNet":
        config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=C)
    elif kind == "ViT":
        config = tf.ViTConfig(**vit, image_size=32, patch_size=8, num_labels=C)
    elif kind == "ConvNext":
        config = tf.ConvNextConfig(hidden_sizes=[8, 8, 12, 16], depths=[1, 1, 1, 1], num_labels=C)
    elif kind == "MobileNetV2":
        config = tf.MobileNetV2Config(image_size=32, depth_multiplier=0.25, num_labels=C)
    elif kind == "Bert":
        return tf.BertForSequenceClassification(tf.BertConfig(**text, num_labels=C))
    else:
        config = tf.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=40, num_labels=C)
        return tf.DistilBertForSequenceClassification(config)
    return getattr(tf, f"{kind}ForImageClassification")(config)


KINDS = ("ResNet", "ViT", "ConvNext", "MobileNetV2", "Bert", "DistilBert")
MODULES: dict[str, Callable[[], Any]] = {
    "torchvision": TorchvisionStyle,
    "timm": TimmStyle,
    **{kind: partial(transformer, kind) for kind in KINDS},
}


def samples(name: str, T: int, seed: int = 0) -> Any:
    """Images, or words and a mask."""
    rng = np.random.default_rng(seed)
    if not name.endswith("Bert"):
        return rng.random((T, 3, 32, 32), np.float32)
    mask = (np.arange(12) < rng.integers(4, 13, (T, 1))).astype(np.int64)
    return {"input_ids": rng.integers(1, 40, (T, 12)) * mask, "attention_mask": mask}


def build(name: str) -> tuple[Any, Any]:
    """A module in mixed modes, with statistics of its own, and an example of three samples."""
    torch.manual_seed(0)
    module = MODULES[name]()
    for p in module.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=(p[0].numel()) ** -0.5)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-0.1, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    module.train()
    next(iter(module.children())).eval()
    return module, tensors(samples(name, 3))


def tensors(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: torch.from_numpy(value) for name, value in x.items()}
    return torch.from_numpy(x)


def call(module: Any, x: Any) -> Array:
    """What a module returns, as an array."""
    with torch.no_grad():
        y = module(**tensors(x)) if isinstance(x, dict) else module(tensors(x))
    return np.asarray(y if isinstance(y, torch.Tensor) else y.logits)


def close(a: Array, b: Array) -> None:
    assert a.shape == b.shape
    assert float(np.abs(a - b).max()) <= TOLERANCE * float(np.abs(b).max())


def snapshot(module: Any) -> Any:
    """All that can be seen of a module."""
    hooks = [[(k, dict(v)) for k, v in vars(m).items() if "hooks" in k and v is not None] for m in module.modules()]
    flags = [(m.training, sorted(vars(m))) for m in module.modules()]
    grads = [(p.requires_grad, p.grad) for p in module.parameters()]
    return hooks, flags, grads, {k: v.numpy().copy() for k, v in module.state_dict().items()}


def same(a: Any, b: Any) -> None:
    assert a[:3] == b[:3]
    assert a[3].keys() == b[3].keys()
    for name, value in a[3].items():
        np.testing.assert_array_equal(value, b[3][name], name)


# -- adapting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_adapted_as_they_are(name: str, tmp_path: Path) -> None:
    module, example = build(name)
    before = snapshot(module)
    base = from_torch(module, example)
    assert base.spec.C == C
    assert base.taps[-1].value == base.candidates[-1].value
    x, y = samples(name, 60), np.arange(60) % C
    tuner = FineTuner(base).fit(x, y)
    decided = tuner.decision_function(x)
    adapted = base.adapted(tuner.adapter_)
    close(call(adapted, x), decided)
    same(snapshot(module), before)
    close(FineTuner(base).fit(tensors(x), torch.from_numpy(y)).decision_function(tensors(x)), decided)
    tuner.adapter.save(tmp_path / "adapter")
    again = from_torch(module, example, like=Adapter.load(tmp_path / "adapter").spec)
    close(FineTuner(again).use(Adapter.load(tmp_path / "adapter", again)).decision_function(x), decided)
    c = base.records(np.asarray(base.pack(x)).reshape(60, -1))[:, base.spec.record.segments[-1].offset :][:, :C]
    module.eval()
    frozen = call(module, x)
    close(np.exp(c) / np.exp(c).sum(axis=1, keepdims=True) if name == "timm" else c, frozen)
    assert np.abs(decided - c).max() > 0.01


@pytest.mark.parametrize("name", ["odd", "lenet5"])
@pytest.mark.parametrize("method", ["skip-ridge", "skip2-lora", "lora-last"])
def test_adapters_are_those_of_our_own_networks(method: str, name: str) -> None:
    """The same network as a module, with the same taps."""
    spec = NETS[name]
    own = Network(spec, tensors_for(spec))
    foreign = from_torch(Twin(own).eval(), torch.zeros(2, *spec.input_shape), "auto:1000000")
    assert foreign.spec.tap_widths == own.spec.tap_widths
    signs = [[s.nonnegative for s in n.spec.record.segments] for n in (own, foreign)]
    assert signs[0] == signs[1]
    x, y = samples_for(spec, 90)
    close(foreign.records(x), get_engine("reference").records(spec, own.tensors, x))
    steps: dict[str, Any] = {} if method == "skip-ridge" else {"epochs": 2, "lr": 0.003}
    a, b = (FineTuner(n, method=method, **steps).fit(x, y).decision_function(x) for n in (own, foreign))
    close(a, b)


class Twin(nn.Module):
    """One of our own networks."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        t = {k: torch.from_numpy(np.array(v)) for k, v in network.tensors.items()}
        for k, (y, g) in enumerate(zip(network.spec.layers, network.spec.geometry, strict=True)):
            W = t[f"layers.{k}.weight"]
            if y.kind == "fc":
                linear, W = nn.Linear(g.N, y.out), W.T
            else:
                linear = nn.Conv2d(g.in_shape[0], y.out, y.kernel, padding=y.padding)
            linear.weight.data, linear.bias.data = W.contiguous(), t[f"layers.{k}.bias"]
            part = [nn.Flatten(), linear] if y.kind == "fc" else [linear]
            if y.batch_norm:
                bn = (nn.BatchNorm1d if y.kind == "fc" else nn.BatchNorm2d)(y.out)
                bn.load_state_dict({n: t[f"layers.{k}.bn.{n}"] for n in bn.state_dict() if n != "num_batches_tracked"}
                                   | {"num_batches_tracked": torch.tensor(0)})  # fmt: skip
                part.append(bn)
            part += [nn.ReLU(inplace=True)] if y.relu else []
            part += [nn.MaxPool2d(y.pool)] if y.pool > 1 else []
            self.parts.append(nn.Sequential(*part))

    def forward(self, x: Any) -> Any:
        for part in self.parts:
            x = part(x)
        return x


def test_taps_are_named_and_pooled() -> None:
    module, example = build("timm")
    base = from_torch(module, example, ["x@2", "mlp.*", "head"])
    assert [tap.name for tap in base.taps] == ["x@2", "mlp.0", "mlp.3", "head"]
    assert base.spec.tap_widths == (0, 12, 17 * 16, 17 * 32, 16)
    x = samples("timm", 7)
    wanted = x.reshape(7, 3, 2, 16, 2, 16).mean(axis=(3, 5)).reshape(7, 12)
    close(base.records(x.reshape(7, -1))[:, :12], wanted)
    # weights of channels are candidates, but not taken by themselves
    assert "se.fc1" in [tap.value for tap in base.candidates]
    assert not {"se.fc1", "se.fc2"} & {tap.value for tap in from_torch(module, example).taps}
    with pytest.raises(UsageError, match=r"names or patterns of candidates \(x, se.fc1"):
        from_torch(module, example, "layer1")


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("sides", [1, 2])
def test_cells_are_means_wherever_features_are(sides: int, last: bool) -> None:
    shape = (6, 4)[:sides]
    features = nn.Linear(3, 2) if last else (nn.Conv1d if sides == 1 else nn.Conv2d)(3, 2, 1)
    module = nn.Sequential(features, nn.Flatten(), nn.Linear(2 * int(np.prod(shape)), C))
    x = np.random.default_rng(0).random((5, *shape, 3) if last else (5, 3, *shape), np.float32)
    base = from_torch(module, torch.from_numpy(x), ["input@2", "2"])
    places = np.moveaxis(x, -1, 1) if last else x
    if sides == 1:  # four cells of six positions, rounded outwards
        cells = np.stack([places[:, :, a:b].mean(2) for a, b in ((0, 2), (1, 3), (3, 5), (4, 6))], 2)
    else:
        cells = places.reshape(5, 3, 2, 3, 2, 2).mean(axis=(3, 5))
    wanted = np.moveaxis(cells, 1, -1) if last else cells
    close(base.records(x.reshape(5, -1))[:, : wanted[0].size], wanted.reshape(5, -1))


def test_a_module_that_runs_twice_has_two_taps() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(6, 6), nn.Linear(6, C)

        def forward(self, x: Any) -> Any:
            return self.out(torch.relu(self.fc(torch.relu(self.fc(x)))))

    module = Shared()
    base = from_torch(module, torch.zeros(2, 6))
    assert [tap.name for tap in base.taps] == ["fc#2", "out"]
    assert [tap.nonnegative for tap in base.taps] == [True, True]
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    with torch.no_grad():
        close(base.records(x)[:, :6], np.asarray(torch.relu(module.fc(torch.from_numpy(x)))))


def test_values_changed_in_place_are_read_before() -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, C)

        def forward(self, x: Any) -> Any:
            h = self.fc1(x)
            z = self.fc2(h)
            h.zero_()
            return self.out(z + h)

    module = Careless()
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    with torch.no_grad():
        close(from_torch(module, torch.zeros(2, 6), "fc2,out").records(x)[:, :6], call(module.fc1, x))


def test_preprocessing_and_bytes() -> None:
    module, example = build("torchvision")
    raw = np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32)).astype(np.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    base = from_torch(module, example, mean=mean, std=std)
    tuner = FineTuner(base).fit(raw, np.arange(40) % C)
    m, s = (np.array(v, np.float32)[:, None, None] for v in (mean, std))
    x = (raw.astype(np.float32) / 255 - m) / s
    close(call(base.adapted(tuner.adapter_), x), tuner.decision_function(raw))


def test_half_precision_and_streams() -> None:
    module, example = build("torchvision")
    base = from_torch(module.to(torch.bfloat16), example.to(torch.bfloat16))
    x, y = samples("torchvision", 60), np.arange(60) % C
    x[:, 0] += y[:, None, None]
    stream = FineTuner(base, cache="nf4")
    for i in range(0, 60, 20):
        stream.partial_fit(x[i : i + 20], y[i : i + 20])
    assert stream.score(x, y) > 0.7
    adapted = base.adapted(stream.adapter_)
    with torch.no_grad():
        y2 = adapted(torch.from_numpy(x).to(torch.bfloat16))
    assert y2.dtype == torch.bfloat16


def test_inputs_in_order_or_by_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.sound, self.out = nn.Linear(6, 4), nn.Conv1d(2, 3, 3), nn.Linear(13, C)

        def forward(self, image: Any, sound: Any) -> Any:
            return self.out(torch.relu(torch.cat([self.image(image), self.sound(sound).flatten(1)], 1)))

    rng = np.random.default_rng(0)
    module, y = Two(), np.arange(50) % C
    image, sound = rng.random((50, 6), np.float32), rng.random((50, 2, 5), np.float32)
    ordered = from_torch(module, (torch.zeros(2, 6), torch.zeros(2, 2, 5)))
    named = from_torch(module, {"sound": torch.zeros(2, 2, 5), "image": torch.zeros(2, 6)})
    assert [tap.name for tap in ordered.taps] == ["out"]
    a = FineTuner(ordered).fit((image, sound), y)
    both: Any = {"sound": sound, "image": image}
    b = FineTuner(named).fit(both, y)
    close(a.decision_function((image, sound)), b.decision_function(both))
    packed = np.asarray(ordered.pack((image, sound)))
    assert packed.shape == (50, 16)
    close(a.decision_function(packed), a.decision_function((image, sound)))
    adapted = ordered.adapted(a.adapter_)
    with torch.no_grad():
        close(np.asarray(adapted(torch.from_numpy(image), torch.from_numpy(sound))), a.decision_function(packed))
    with pytest.raises(DataError, match=r"inputs \(image, sound\), not image"):
        a.predict({"image": image})
    with pytest.raises(DataError, match=r"a dict of the network's inputs \(image, sound\)"):
        a.predict(image)
    with pytest.raises(DataError, match=r"sound must be \(T, 2, 5\)"):
        a.predict((image, sound[:-1]))
    with pytest.raises(DataError, match="image must be float or uint8, not int64"):
        a.predict((np.zeros((50, 6), np.int64), sound))


def test_words() -> None:
    module, example = build("Bert")
    base = from_torch(module, example)
    x, y = samples("Bert", 40), np.arange(40) % C
    tuner = FineTuner(base).fit(x, y)
    with pytest.raises(DataError, match="input_ids must be integers, not float32"):
        tuner.predict(cast(Any, {**x, "input_ids": x["input_ids"].astype(np.float32)}))
    with pytest.raises(DataError, match="integers of at most 16777216, not 16777217"):
        tuner.predict(cast(Any, {**x, "input_ids": np.full((40, 12), (1 << 24) + 1)}))
    with pytest.raises(DataError, match="must run on these samples, but does not: index out of range"):
        tuner.predict(cast(Any, {**x, "input_ids": np.full((40, 12), 40)}))
    with pytest.raises(DataError, match=r"input_ids must be \(T, 12\)"):
        tuner.predict(cast(Any, {k: v[:, :11] for k, v in x.items()}))


# -- a score for every position --------------------------------------------------------------------------------------


class Tagger(nn.Module):
    """Words, each scored in the light of its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.near = nn.Embedding(40, 8), nn.Conv1d(8, 12, 3, padding=1)
        self.mix, self.classifier = nn.Linear(12, 10), nn.Linear(10, C)

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        x = self.words(input_ids) * attention_mask.unsqueeze(-1)
        x = torch.relu(self.near(x.transpose(1, 2))).transpose(1, 2)
        return {"logits": self.classifier(torch.tanh(self.mix(x)))}


def tagged(T: int, seed: int = 0) -> tuple[Any, Array]:
    """Words, and for each a class that follows from it; -100 for one in ten."""
    x = samples("Bert", T, seed)
    y = (x["input_ids"] * 7 % C).astype(np.int64)
    y[np.random.default_rng(seed + 1).random(y.shape) < 0.1] = -100
    return x, y


def tagger(kind: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    if kind == "own":
        return Tagger(), tensors(samples("Bert", 3))
    tf = pytest.importorskip("transformers", reason="these networks are built from configs of transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    module = tf.BertForTokenClassification(tf.BertConfig(**sizes, vocab_size=40, num_labels=C))
    nn.init.normal_(module.bert.embeddings.word_embeddings.weight)
    return module, tensors(samples("Bert", 3))


@pytest.mark.parametrize("kind", ["own", "Bert"])
def test_tokens(kind: str, tmp_path: Path) -> None:
    module, example = tagger(kind)
    before = snapshot(module)
    base = from_torch(module, example)
    assert base.spec.positions == 12
    assert base.spec.C == C
    assert not any(tap.value == "near" for tap in base.candidates)  # it has no value for each position, in its order
    x, y = tagged(60)
    tuner = FineTuner(base).fit(x, y)
    T = int(((y != -100) & (x["attention_mask"] == 1)).sum())
    assert tuner.judge().n <= T
    assert tuner.store_ is not None
    assert tuner.store_.capacity == T
    decided = tuner.decision_function(x)
    assert decided.shape == (60, 12, C)
    assert tuner.predict(x).shape == (60, 12)
    np.testing.assert_allclose(tuner.predict_proba(x).sum(axis=2), 1, rtol=1e-5)
    counted = (y != -100) & (x["attention_mask"] == 1)
    assert tuner.score(x, y) == pytest.approx((tuner.predict(x) == y)[counted].mean())
    assert tuner.score(*tagged(60, 5)) > 0.3
    adapted = base.adapted(tuner.adapter_)
    close(call(adapted, x), decided)
    same(snapshot(module), before)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(adapted, (), example, dynamic_shapes={name: {0: batch} for name in example})
    close(call(program.module(), x), decided)
    tuner.adapter.save(tmp_path / "adapter")
    again = from_torch(module, example, like=Adapter.load(tmp_path / "adapter").spec)
    close(FineTuner(again).use(Adapter.load(tmp_path / "adapter", again)).decision_function(x), decided)
    # what lies under the mask is not learnt from, and no label is needed there
    wrong = np.where(x["attention_mask"] == 1, y, C + 7)
    np.testing.assert_array_equal(FineTuner(base).fit(x, wrong).decision_function(x), decided)


def test_records_of_positions_are_those_of_the_module() -> None:
    module, example = tagger("own")
    base = from_torch(module, example, "mix,classifier")
    x, _ = tagged(70)
    rows = np.asarray(base.pack(x))
    assert rows.shape == (70 * 12, 25)
    with torch.no_grad():
        h = torch.relu(module.near((module.words(tensors(x)["input_ids"]) * tensors(x)["attention_mask"][..., None])
                                   .transpose(1, 2))).transpose(1, 2)  # fmt: skip
    wanted = np.asarray(h).reshape(-1, 12)
    close(base.records(rows)[:, :12], wanted)
    some = np.random.default_rng(0).permutation(len(rows))[:300]
    np.testing.assert_array_equal(base.records(rows[some])[:, :12], base.records(rows)[some, :12])


@pytest.mark.parametrize("method", ["skip2-lora", "skip-lora", "lora-last"])
def test_steps_on_tokens(method: str) -> None:
    base = from_torch(*tagger("own"))
    x, y = tagged(40)
    tuner = FineTuner(base, method=method, epochs=3).fit(x, y)
    assert tuner.score(x, y) > 1 / C
    stream = FineTuner(base, method=method).partial_fit(x, y).partial_fit(x, y)
    assert stream.decision_function(x).shape == (40, 12, C)


def test_weights_and_groups_of_sentences() -> None:
    base = from_torch(*tagger("own"))
    x, y = tagged(40)
    half: Any = {k: v[:20] for k, v in x.items()}
    twice: Any = {k: np.concatenate([v[:20], v[:20]]) for k, v in x.items()}
    groups = np.arange(20)
    a = FineTuner(base).fit(twice, np.concatenate([y[:20], y[:20]]), groups=np.tile(groups, 2))
    b = FineTuner(base).fit(half, y[:20], np.full(20, 2.0), groups=groups)
    assert a.decision_function(x).shape == b.decision_function(x).shape
    for wrong in ({"groups": np.arange(39)}, {"sample_weight": np.ones(480)}):
        with pytest.raises(DataError, match=r"must be \(40,\), one a sample"):
            FineTuner(base).fit(x, y, **wrong)


def test_labels_of_tokens_that_cannot_be_used() -> None:
    base = from_torch(*tagger("own"))
    x, y = tagged(40)
    for wrong in (y[:, :11], y[:39], y.reshape(-1), y[:, 0]):
        with pytest.raises(DataError, match=r"y must be \(40, 12\), one label a position \(-100: none\), not"):
            FineTuner(base).fit(x, wrong)
    with pytest.raises(DataError, match="a label other than -100"):
        FineTuner(base).fit(x, np.full_like(y, -100))
    with pytest.raises(DataError, match="y must be 0 to 4"):
        FineTuner(base).fit(x, np.where(y == 4, 5, y))
    with pytest.raises(
        DataError, match=r"y must be \(T, 12, 5\) numbers, one a position and output, not \[1\] a position"
    ):
        FineTuner(base, task="regression").fit(x, y.astype(float))


# -- what comes out --------------------------------------------------------------------------------------------------


def test_a_head_is_a_plain_module() -> None:
    module, example = build("torchvision")
    base = from_torch(module, example, "layer2.0.conv2,classifier.1")
    x, y = samples("torchvision", 60), np.arange(60) % C
    for method in ("skip-ridge", "skip2-lora"):
        tuner = FineTuner(base, method=method).fit(x, y)
        head = base.head(tuner.adapter_)
        assert {k: v.shape for k, v in head.state_dict().items()} == {
            k: v.shape for k, v in tuner.adapter_.tensors.items()
        }
        rows = base.records(x.reshape(60, -1))
        *taps, c = (torch.from_numpy(rows[:, s.offset : s.offset + s.size]) for s in base.spec.record.segments)
        close(np.asarray(head(c, c, *taps)), tuner.decision_function(x))
        other = type(head)({k: np.zeros_like(v) for k, v in tuner.adapter_.tensors.items()}, base.spec.L, C)
        other.load_state_dict(head.state_dict())
        close(np.asarray(other(c, c, *taps)), tuner.decision_function(x))


@pytest.mark.parametrize("name", ["torchvision", "timm", "Bert"])
def test_adapted_modules_are_exported(name: str) -> None:
    module, example = build(name)
    base = from_torch(module, example)
    x, y = samples(name, 40), np.arange(40) % C
    tuner = FineTuner(base).fit(x, y)
    before, batch = snapshot(module), torch.export.Dim("batch", min=2, max=64)
    arguments = ((), example) if isinstance(example, dict) else ((example,), {})
    shapes = {name: {0: batch} for name in arguments[1] or "x"}
    program = torch.export.export(base.adapted(tuner.adapter_), *arguments, dynamic_shapes=shapes)
    same(snapshot(module), before)
    close(call(program.module(), x), tuner.decision_function(x))


def test_adapters_are_switched_without_reloading() -> None:
    module, example = build("torchvision")
    base = from_torch(module, example)
    x = samples("torchvision", 60)
    x[:, 0] += (np.arange(60) % C)[:, None, None]
    a, b = (FineTuner(base).fit(x, (np.arange(60) + i) % C) for i in (0, 1))
    said = [t.decision_function(x) for t in (a, b)]
    assert np.abs(said[0] - said[1]).max() > 0.1
    one, adapted, heads = FineTuner(base), base.adapted(a.adapter_), [base.head(t.adapter_) for t in (a, b)]
    for i in (1, 0, 1):
        close(one.use((a, b)[i].adapter_).decision_function(x), said[i])
        adapted.head = heads[i]
        close(call(adapted, x), said[i])


# -- what is refused -------------------------------------------------------------------------------------------------


def test_training_is_refused_and_left_alone() -> None:
    class Always(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, C)

        def forward(self, x: Any) -> Any:
            return self.b(functional.dropout(self.a(x)))

    module = Always().train()
    with pytest.raises(UsageError, match=r"draws random numbers \(\w+ in its forward\) even in eval mode"):
        from_torch(module, torch.zeros(2, 6))
    assert module.training
    norm = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, C))
    with pytest.raises(UsageError, match=r"a batch norm \(1\) that uses the batch's"):
        from_torch(norm, torch.zeros(2, 6))
    instance = nn.Sequential(nn.Conv2d(3, 8, 1), nn.InstanceNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, C))
    assert from_torch(instance, torch.zeros(2, 3, 4, 4)).spec.C == C
    usual = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, C)).train()
    base = from_torch(usual, torch.zeros(2, 6))
    x = np.random.default_rng(0).random((30, 6), np.float32)
    close(base.records(x[:3]), base.records(x)[:3])
    assert usual[1].num_batches_tracked == 0
    assert all(m.training for m in usual.modules())


class Plain(nn.Module):
    """fc1, ReLU, fc2, and then whatever is asked for."""

    def __init__(self, end: Callable[[Any], Any]) -> None:
        super().__init__()
        self.fc1, self.fc2, self.end = nn.Linear(6, 8), nn.Linear(8, C), end

    def forward(self, x: Any) -> Any:
        return self.end(self.fc2(torch.relu(self.fc1(x))))


ENDINGS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "relu": (torch.relu, "must end in a linear layer .* but Plain ends in 'Relu': let it end in its logits"),
    "norm": (lambda y: functional.layer_norm(y, (C,)), "must end in a linear layer"),
    "product": (lambda y: y * y, "must end in a linear layer"),
    "square": (lambda y: y[:, :, None] + torch.zeros(C), r"one score a class, but Plain ends in \[5, 5\]"),
    "two": (lambda y: (y, y + 1), "return one tensor, or one called logits, but Plain returns tuple"),
    "none": (lambda y: {"a": y, "b": y}, "or one called logits, but Plain returns a, b"),
    "mixed": (lambda y: y.reshape(-1), r"keep the batch in front, but of 5 samples Plain yields \[25\]"),
    "constant": (lambda y: torch.zeros(len(y), C), "with weights of its own"),
    "summed": (lambda y: y.sum(), "must end in a linear layer|batch in front"),
}


@pytest.mark.parametrize("end", ENDINGS)
def test_modules_that_do_not_end_in_scores(end: str) -> None:
    module = Plain(ENDINGS[end][0])
    before = snapshot(module)
    with pytest.raises(UsageError, match=ENDINGS[end][1]):
        from_torch(module, torch.zeros(2, 6))
    same(snapshot(module), before)


def test_modules_that_end_in_scores() -> None:
    x = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    for end in (
        lambda y: y.log_softmax(-1),
        lambda y: {"logits": y, "b": y},
        lambda y: (y,),
        lambda y: y + 1,
        torch.sigmoid,
    ):
        base = from_torch(Plain(end), torch.zeros(2, 6))
        assert [tap.name for tap in base.taps] == ["fc2"]
        tuner = FineTuner(base).fit(x, np.arange(20) % C)
        close(call(base.adapted(tuner.adapter_), x), tuner.decision_function(x))


@pytest.mark.parametrize("targets", [1, 3])
def test_numbers_and_several_labels(targets: int) -> None:
    x = np.random.default_rng(0).normal(size=(80, 6)).astype(np.float32)
    wanted = (x[:, :1] * x[:, 1:2] + x[:, :targets]).astype(np.float32)
    module = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, targets))
    base = from_torch(module, torch.zeros(2, 6))
    tuner = FineTuner(base, task="regression").fit(x, wanted)
    assert tuner.score(x, wanted) > 0.8
    close(call(base.adapted(tuner.adapter_), x), tuner.decision_function(x))
    if targets == 1:
        with pytest.raises(DataError, match="a network of one output has no classes"):
            FineTuner(base).fit(x, np.arange(80) % 2)
    with pytest.raises(DataError, match="only who made the model can give it a head"):
        FineTuner(base, task="regression").fit(x, np.zeros((80, targets + 1)))
    if targets > 1:
        assert FineTuner(base, task="multi-label").fit(x, wanted > 0).score(x, wanted > 0) > 0.8


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_bad_modules_and_examples() -> None:
    module = Plain(lambda y: y)
    for wrong in ("model.pt", None, torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), nn.Linear):
        with pytest.raises(UsageError, match=r"must be an nn\.Module, uncompiled"):
            from_torch(wrong, torch.zeros(2, 6))
    with pytest.raises(UsageError, match=r"torch\.compile"):
        from_torch(torch.compile(module), torch.zeros(2, 6))
    with pytest.raises(UsageError, match="device meta"):
        from_torch(nn.Sequential(nn.Linear(6, C, device="meta")), torch.zeros(2, 6))
    for example in (
        {"x": "text"},
        [1, 2],
        None,
        {},
        torch.zeros(6),
        torch.zeros(0, 6),
        (torch.zeros(2, 6), torch.zeros(3, 6)),
    ):
        with pytest.raises(UsageError, match="example_input must"):
            from_torch(module, example)
    with pytest.raises(DataError, match=r"must run on example_input, but Plain does not: mat1 and mat2"):
        from_torch(module, torch.zeros(2, 7))
    with pytest.raises(UsageError, match="real numbers"):
        from_torch(module, torch.zeros(2, 6, dtype=torch.complex64))
    base = from_torch(module, torch.zeros(2, 6))
    with pytest.raises(UsageError, match="a PyTorch module must be adapted by a method that needs only its taps"):
        FineTuner(base, method="ft-all")
    with pytest.raises(UsageError, match="saved by who made it"):
        base.save("x")
    with pytest.raises(UsageError, match="a class can be added"):
        base.widened()


def test_results_that_are_not_finite() -> None:
    module = Plain(lambda y: y)
    base = from_torch(module, torch.zeros(2, 6))
    x = np.ones((20, 6), np.float32)
    with torch.no_grad():
        module.fc1.weight.fill_(1e38)
    with pytest.raises(DataError, match="must be finite, but of sample 0 they are not"):
        FineTuner(base).fit(x, np.arange(20) % C)


class Branch(nn.Module):
    """Goes another way where a number says so: one of the input, or one that it computed."""

    def __init__(self, computed: bool) -> None:
        super().__init__()
        self.a, self.b, self.computed = nn.Linear(6, 8), nn.Linear(8, C), computed

    def forward(self, x: Any) -> Any:
        h = self.a(x)
        return self.b(-h if (h if self.computed else x).isnan().any() else torch.relu(h))


def test_branches_on_what_is_computed_are_refused() -> None:
    with pytest.raises(UsageError, match=r"same way for every sample, but Branch \(its forward\) takes a number"):
        from_torch(Branch(True), torch.zeros(2, 6))
    assert repr(from_torch(Branch(False), torch.zeros(2, 6))).startswith("TorchNetwork(6 → 5, 2 layers, ")


def test_a_module_that_was_changed_is_another_network() -> None:
    module, x, y = Plain(lambda y: y), np.random.default_rng(0).random((30, 6), np.float32), np.arange(30) % C
    tuner = FineTuner(from_torch(module, torch.zeros(2, 6))).fit(x, y)
    module.train()
    tuner.predict(x)
    with torch.no_grad():
        module.fc1.bias += 1
    with pytest.raises(MismatchError, match="made on"):
        tuner.predict(x)
    with torch.no_grad():
        module.fc1.bias -= 1
    module.fc2 = nn.Sequential(nn.Linear(8, C))
    with pytest.raises(MismatchError, match="made on"):
        tuner.predict(x)


def test_threads_of_pytorch_are_put_back() -> None:
    before = torch.get_num_threads()
    base = from_torch(Plain(lambda y: y), torch.zeros(2, 6))
    FineTuner(base, threads=before + 1).fit(np.zeros((20, 6), np.float32), np.arange(20) % C)
    assert torch.get_num_threads() == before


def test_pickles_are_not_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pt"
    torch.save(Plain(torch.relu).state_dict(), path)
    for name in ("model.pt", "model.pth", "model.pt2"):
        path = path.rename(tmp_path / name)
        assert command_line(["finetune", str(path), "--data", "x.npz", "--out", str(tmp_path / "a")]) == 2
        error = capsys.readouterr().err
        assert "from_torch" in error
        assert "ONNX" in error
        assert len(error.splitlines()) == 1


def test_without_pytorch() -> None:
    code = "import sys; sys.modules['torch'] = None; import instantft; instantft.from_torch(None, None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "EngineError: PyTorch must be installed to run its modules" in done.stderr


def test_type_of_network() -> None:
    assert isinstance(from_torch(Plain(lambda y: y), np.zeros((2, 6), np.float32)), TorchNetwork)
