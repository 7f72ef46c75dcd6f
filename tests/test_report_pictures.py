"""Pictures and the HTML page: what is drawn is what was recorded, read back from the artists."""

from __future__ import annotations

import base64
import statistics
from html.parser import HTMLParser

import numpy as np
import pytest
from studies import LPC, VAE, Builder, measured, trajectories

from lpc_runner.paper.chain_figures import representative
from lpc_runner.report import main, study_pictures
from lpc_runner.study.study import read_study
from lpc_runner.study.style import HARD, short_labels, wrapped

FD = "fd_random_conv"
SILENT = ("area", "br", "img", "link", "meta", "input", "hr")


@pytest.fixture
def disk(tmp_path):
    return Builder(tmp_path / "outputs")


def pictures(disk, warnings=None):
    found = study_pictures(read_study(disk.study), [] if warnings is None else warnings)
    return {picture.name: picture for picture in found}


def texts(items):
    return [item.get_text() for item in items]


# Figure 2 -------------------------------------------------------------------------------------------------


def objectives(disk, forward="diverged"):
    """Three seeds by objective."""
    values = {"forward": (90.0, 60.0, 30.0), "reverse": (7.0, 8.0, 9.0), "jeffreys": (5.0, 6.0, 7.0), "prior": (20,)}
    for objective, own in values.items():
        status = forward if objective == "forward" else "finished"
        for seed, fd in enumerate(own):
            metrics = {FD: float(fd), "density_random_conv": 1 / fd, "kid_random_conv": 0.1}
            disk.run(f"{objective}{seed}", LPC | {"objective": objective}, seed, metrics=metrics, status=status)


def test_bars_are_means_lines_standard_deviations_and_dots_seeds(disk):
    objectives(disk)
    disk.run("vae", VAE, metrics={FD: 1.0})
    figure = pictures(disk)["digits-objectives-random_conv.png"].figure
    distance, density = figure.axes
    assert [bar.get_width() for bar in distance.patches] == [60.0, 8.0, 6.0, 20.0]
    assert [bar.get_width() for bar in density.patches][1] == pytest.approx(statistics.fmean([1 / 7, 1 / 8, 1 / 9]))
    lines = [line.get_segments()[0][:, 0] for line in distance.collections if hasattr(line, "get_segments")]
    assert [list(ends) for ends in lines] == [[30.0, 90.0], [7.0, 9.0], [5.0, 7.0]]  # one seed has none
    dots = [list(c.get_offsets()[:, 0]) for c in distance.collections if not hasattr(c, "get_segments")]
    assert dots == [[90.0, 60.0, 30.0], [7.0, 8.0, 9.0], [5.0, 6.0, 7.0]]
    assert distance.get_xlim()[0] == 0  # a bar's length is its value


def test_a_diverged_bar_is_hatched_and_says_which_state_it_is(disk):
    objectives(disk)
    axis = pictures(disk)["digits-objectives-random_conv.png"].figure.axes[0]
    assert [bool(bar.get_hatch()) for bar in axis.patches] == [True, False, False, False]
    assert texts(axis.get_yticklabels()) == [
        "forward KL\n(last finite state)", "reverse KL", "Jeffreys", "no warm start"
    ]  # fmt: skip


def test_bars_over_more_than_a_factor_of_twenty_are_logarithmic(disk):
    for objective, fd in (("forward", 900.0), ("reverse", 9.0)):
        disk.run(objective, LPC | {"objective": objective}, metrics={FD: fd})
    axis = pictures(disk)["digits-objectives-random_conv.png"].figure.axes[0]
    assert axis.get_xscale() == "log"
    assert [bar.get_x() + bar.get_width() for bar in axis.patches] == [900.0, 9.0]


def test_one_objective_or_no_value_makes_no_bars(disk):
    for beta in (0.25, 0.9):
        disk.run(f"b{beta}", LPC | {"beta": beta}, metrics={FD: 3.0})
    disk.run("reverse", LPC | {"objective": "reverse"}, metrics={"kid_random_conv": 3.0})
    assert not [name for name in pictures(disk) if "objectives" in name]


# Figures 3, 7 and 8 ---------------------------------------------------------------------------------------


def traced(disk, num_steps=12, batch=4, vae=True):
    """Two seeds of two objectives, one batch for the second."""
    source, traces = np.random.default_rng(0), {}
    for objective, updates in (("reverse", (300, 600)), ("forward", (300,))):
        for seed in (0, 1):
            own = {u: source.uniform(1, 2, (2, num_steps, batch)) * [[[1000]], [[50]]] for u in updates}
            traces[objective, seed] = own
            keys = LPC | {"objective": objective, "num_steps": num_steps}
            disk.run(f"traced-{objective}{seed}", keys, seed, metrics={FD: 3.0}, traces=own)
    if vae:
        disk.run("vae", VAE, metrics={FD: 1.0})
    return traces


def test_chains_are_medians_and_middle_halves_over_the_chains_of_all_seeds(disk):
    traces = traced(disk)
    found = pictures(disk)
    for name, values in (
        ("digits-delta-log-joint.png", lambda pair: np.diff(pair[0], axis=0)),
        ("digits-drift-norm.png", lambda pair: pair[1]),
    ):
        first, second = found[name].figure.axes
        assert [first.get_title(), second.get_title()] == ["training batch 300", "training batch 600"]
        for panel, objective, line, band, update in (
            (first, "forward", 0, 0, 300),
            (first, "reverse", 1, 1, 300),
            (second, "reverse", 0, 0, 600),
        ):
            pooled = np.concatenate([values(traces[objective, seed][update]) for seed in (0, 1)], axis=1)
            drawn = panel.lines[line]
            assert list(drawn.get_xdata()) == list(range(1, len(pooled) + 1))
            np.testing.assert_allclose(drawn.get_ydata(), np.median(pooled, axis=1))
            corners = panel.collections[band].get_paths()[0].vertices
            at_two = corners[corners[:, 0] == 2][:, 1]
            np.testing.assert_allclose([at_two.min(), at_two.max()], np.percentile(pooled[1], [25, 75]))
    assert "nats" in found["digits-delta-log-joint.png"].figure.axes[0].get_ylabel()
    assert found["digits-drift-norm.png"].figure.axes[0].get_yscale() == "log"
    same = [line.get_color() for line in (first.lines[1], second.lines[0])]
    assert same[0] == same[1]  # a method keeps its colour


def test_large_gains_stand_on_a_scale_that_shows_small_ones_too(disk):
    gains = np.concatenate([np.full(10, 2000.0), np.tile([0.5, -0.5], 45)])
    log_joint = np.concatenate([[0], np.cumsum(gains)])[:, None] * np.ones((1, 3))
    traces = {300: (log_joint, np.ones_like(log_joint))}
    disk.run("a", LPC | {"objective": "forward", "num_steps": 101}, metrics={FD: 3.0}, traces=traces)
    axis = pictures(disk)["digits-delta-log-joint.png"].figure.axes[0]
    assert axis.get_yscale() == "symlog" and axis.get_xscale() == "log"
    assert axis.get_ylim()[0] < -0.5 and axis.get_ylim()[1] > 2000


def test_damaged_traces_and_values_beyond_all_bounds_are_left_out(disk):
    traced(disk)
    (disk.study / "traced-reverse0" / "traces" / "update-000000300.npz").write_bytes(b"no archive")
    log_joint = np.ones((12, 4))
    log_joint[3:, 0] = np.nan
    log_joint[8:] = -np.inf
    traces = {300: (log_joint, np.ones((12, 4)))}
    disk.run("wild", LPC | {"num_steps": 12}, metrics={FD: 3.0}, traces=traces)
    warnings = []
    found = pictures(disk, warnings)["digits-delta-log-joint.png"].figure.axes[0]
    assert warnings == ["traced-reverse0/traces/update-000000300.npz is damaged: left out"]
    assert len(found.lines) == 4  # three methods and the line at zero
    assert max(max(line.get_xdata()) for line in found.lines if line.get_color() == found.lines[2].get_color()) <= 11
    assert all(np.isfinite(line.get_ydata()).all() for line in found.lines)


# Figure 4 -------------------------------------------------------------------------------------------------


def test_step_sizes_have_a_line_per_beta_of_finished_cells_and_crosses_for_diverged_ones(disk):
    values = {(None, 0.01): (4, 6), (None, 0.1): (8, 8), (0.25, 0.01): (9, 11), (0.25, 0.1): (3, 5)}
    for (beta, step_size), own in values.items():
        for seed, fd in enumerate(own):
            keys = LPC | {"step_size": step_size}
            keys |= {"preconditioning": "none"} if beta is None else {"beta": beta}
            wild = beta is None and step_size == 0.1
            status = "diverged" if wild else "finished"
            disk.run(f"b{beta}g{step_size}s{seed}", keys, seed, metrics={FD: float(fd)}, status=status)
    figure = pictures(disk)["digits-step-sizes-random_conv.png"].figure
    (axis,) = figure.axes
    bars = {bar.get_label(): bar for bar in axis.containers}
    assert list(bars) == ["no preconditioning", "β = 0.25"]
    assert [list(bars[name][0].get_ydata()) for name in bars] == [[5.0], [10.0, 4.0]]
    ends = bars["β = 0.25"][2][0].get_segments()
    np.testing.assert_allclose([end[:, 1] for end in ends], [[10 - 2**0.5, 10 + 2**0.5], [4 - 2**0.5, 4 + 2**0.5]])
    np.testing.assert_allclose(
        np.array(bars["β = 0.25"][0].get_xdata(), float), [0.01, 0.1], rtol=0.05
    )  # beside one another
    (cross,) = [line for line in axis.lines if line.get_marker() == "x"]
    assert list(cross.get_xdata()) == [0.1] and cross.get_color() == bars["no preconditioning"][0].get_color()
    assert axis.get_xscale() == "log" and axis.get_xlabel() == "step size γ"
    assert texts(axis.get_xticklabels()) == ["0.01", "0.1"]
    assert texts(figure.legends[0].get_texts()) == ["no preconditioning", "β = 0.25", "a seed diverged"]


def test_methods_that_differ_in_more_than_step_size_and_preconditioner_are_no_sweep(disk):
    disk.run("a", LPC, metrics={FD: 3.0})
    disk.run("b", LPC | {"preconditioning": "none", "step_size": 0.001}, metrics={FD: 3.0})  # a line of one cell
    disk.run("c", LPC | {"objective": "reverse", "step_size": 0.5}, metrics={FD: 3.0})
    assert not [name for name in pictures(disk) if "step-sizes" in name]


def test_a_sweep_in_which_everything_diverged_still_says_so(disk):
    for step_size in (0.1, 0.5):
        disk.run(f"g{step_size}", LPC | {"step_size": step_size}, metrics={FD: 3.0}, status="diverged")
    (axis,) = pictures(disk)["digits-step-sizes-random_conv.png"].figure.axes
    assert [list(line.get_xdata()) for line in axis.lines if line.get_marker() == "x"] == [[0.1, 0.5]]


# Figures 1 and 6 ------------------------------------------------------------------------------------------


def test_trajectories_stand_side_by_side_over_contours_the_right_way_round(disk):
    folder = disk.run("a", LPC, metrics={FD: 3.0})
    arrays = trajectories(folder, points=41)
    found = pictures(disk)
    figure = found["digits-trajectories.png"].figure
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:3] == ["observation x", "predictive coding", "Langevin"] and len(figure.axes) == 9
    panel = figure.axes[2]
    (path,) = [c for c in panel.collections if type(c).__name__ == "LineCollection"]
    np.testing.assert_allclose([s[0] for s in path.get_segments()], arrays["langevin_coordinates"][:-1, 0])
    lightness = path.get_colors()[:, :3].sum(axis=1)
    assert (np.diff(lightness) < 0).all()  # early steps lighter
    ends = {c.get_label(): c.get_offsets()[0] for c in panel.collections if c.get_label().startswith("z(")}
    np.testing.assert_allclose([ends["z(0)"], ends["z(T)"]], [[2, 1], [0, 0]], atol=1e-12)
    # a² + 10 b²: level sets are √10 times as wide along direction 1 as they are high along direction 2
    contours = [c for c in panel.collections if type(c).__name__ == "QuadContourSet" and not c.filled]
    (lines,) = contours
    level = next(level for level in lines.levels if 1.5 < level < 7)
    corners = np.concatenate(lines.allsegs[list(lines.levels).index(level)])
    assert corners[:, 0].max() / corners[:, 1].max() == pytest.approx(10**0.5, rel=0.05)
    assert "90% of variance" in panel.get_xlabel() and "10% of variance" in panel.get_ylabel()
    image = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(image, 128 / 255)
    for name in ("map", "langevin"):
        small = found[f"digits-trajectories-{name}.png"].figure
        assert sum(bool(axis.collections) for axis in small.axes) == 5  # all observations


def test_the_run_shown_is_a_langevin_chain_of_jeffreys_where_there_is_one(disk):
    for name, keys, names in (
        ("pc", {"sampler": "map", "objective": "prior", "preconditioning": "none"}, ("map",)),
        ("reverse", LPC | {"objective": "reverse"}, ("map", "langevin")),
        ("jeffreys", LPC, ("map", "langevin")),
    ):
        trajectories(disk.run(name, keys, metrics={FD: 3.0}), names)
        group, _, data = representative(read_study(disk.study).groups, [])
        expected = {"pc": "PC", "reverse": "LPC reverse", "jeffreys": "LPC jeffreys"}
        assert group.method == expected[name] and set(data) == {"images", *names}
    (disk.study / "jeffreys" / "trajectories.npz").write_bytes(b"PK no archive")
    warnings = []
    assert representative(read_study(disk.study).groups, warnings)[0].method == "LPC reverse"
    assert warnings == ["jeffreys/trajectories.npz is damaged: left out"]


def test_trajectories_whose_shapes_do_not_fit_are_damaged(disk):
    folder = disk.run("a", LPC, metrics={FD: 3.0})
    arrays = trajectories(folder)
    arrays["langevin_potential"] = arrays["langevin_potential"][:, :-1]
    np.savez(folder / "trajectories.npz", **arrays)
    warnings = []
    found = pictures(disk, warnings)
    assert warnings == ["a/trajectories.npz is damaged: left out"]
    assert "digits-trajectories-map.png" in found and "digits-trajectories-langevin.png" not in found


# Compute and labels ---------------------------------------------------------------------------------------


def compute(disk):
    for seed in (0, 1):
        for name, keys, pace, price in (("vae", VAE, 0.01, 1), ("lpc", LPC, 0.4, 300)):
            rows = [measured(u, u * pace, 40.0 - u / 10 + seed, evaluations=u * price) for u in (20, 40, 60)]
            total = {"num_updates": 80, "train_seconds": 80 * pace, "gradient_evaluations": 80 * price}
            disk.run(f"{name}{seed}", keys, seed, rows=rows, metrics={FD: 20.0 + seed}, **total)


def test_the_compute_matched_view_is_against_gradient_evaluations_and_seconds(disk):
    compute(disk)
    figure = pictures(disk)["digits-compute-random_conv.png"].figure
    evaluations, seconds = figure.axes
    vae, lpc = evaluations.lines
    assert list(vae.get_xdata()) == [20, 40, 60, 80] and list(lpc.get_xdata()) == [6000, 12000, 18000, 24000]
    assert list(lpc.get_ydata()) == [38.5, 36.5, 34.5, 20.5]
    assert list(seconds.lines[1].get_xdata()) == pytest.approx([8, 16, 24, 32])
    assert evaluations.get_xscale() == seconds.get_xscale() == "log"
    assert "gradient evaluations" in evaluations.get_xlabel() and "(s" in seconds.get_xlabel()


def test_labels_keep_what_differs_and_lines_break_after_commas(disk):
    disk.run("a", LPC, metrics={FD: 1.0})
    disk.run("b", LPC | {"preconditioning": "none", "step_size": 0.5}, metrics={FD: 1.0})
    groups = read_study(disk.study).groups
    assert short_labels(groups, lambda group: "x") == ["x, adam, γ=0.1", "x, no preconditioning, γ=0.5"]
    assert wrapped("one two, three four, five", 12) == "one two,\nthree four,\nfive"
    assert HARD not in wrapped("one two, three", 10)


# The page -------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags in order, checked for balance; pictures, links and anchors."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.images, self.ids, self.links, self.words = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.open += [] if tag in SILENT else [tag]
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[key] for key in ("href", "src") if key in attributes and tag != "img"]
        self.images += [attributes] if tag == "img" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def everything(disk):
    compute(disk)
    objectives(disk)
    traced(disk, vae=False)
    trajectories(disk.study / "jeffreys0")
    rough = np.random.default_rng(0).uniform(size=(40, 40))
    disk.run("extra", LPC | {"objective": "reverse", "beta": 0.5}, metrics={FD: 2.0}, samples=rough)
    (disk.study / "<b>&").mkdir()  # a warning with a name that HTML would swallow


def test_the_page_parses_and_holds_every_picture_once_and_nothing_from_outside(disk, tmp_path):
    everything(disk)
    contents = []
    for folder in (disk.study / "report", tmp_path / "again"):
        main([str(disk.study), "--output", str(folder)])
        contents.append({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    assert contents[0] == contents[1]  # the same study, the same bytes
    drawn = {name: content for name, content in contents[0].items() if name.endswith(".png")}
    assert {name.partition("-")[2].removesuffix(".png").partition("-")[0] for name in drawn} >= {
        "objectives", "delta", "drift", "trajectories", "compute", "samples", FD
    }  # fmt: skip
    assert all(content.startswith(b"\x89PNG") and len(content) > 5000 for content in drawn.values())
    assert all(f"]({name})".encode() in contents[0]["report.md"] for name in drawn) and "report.csv" in contents[0]
    text = contents[0]["report.html"].decode()
    page = Page(text)
    embedded = [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in page.images]
    assert sorted(embedded) == sorted(drawn.values())
    assert all(image["alt"] for image in page.images)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert len(page.ids) == len(set(page.ids)) and "url(" not in text and "http" not in text.split("base64")[0]
    assert "prefers-color-scheme" in text and "width=device-width" in text
    assert any("<b>&" in word for word in page.words)  # shown, not interpreted


def test_the_page_has_every_table_cell_for_cell(disk):
    from lpc_runner.report import study_tables

    objectives(disk)
    main([str(disk.study)])
    page = Page((disk.study / "report" / "report.html").read_text())
    tables = study_tables(read_study(disk.study))
    assert page.tags.count("table") == len(tables)
    cells = [cell for table in tables for row in [table.columns, *table.rows] for cell in row if cell]
    words = [word for word in page.words if word.strip()]
    assert not [cell for cell in cells if cell not in words]
    assert page.tags.count("td") == sum(len(row) for table in tables for row in table.rows)


def test_trajectories_of_what_is_no_image_have_no_picture_and_are_not_damaged(disk):
    folder = disk.run("a", LPC, dataset="lorenz", metrics={"co_bps": 0.25}, shape=(50, 29))
    arrays = trajectories(folder)
    arrays["images"] = np.zeros((5, 50, 29))
    np.savez(folder / "trajectories.npz", **arrays)
    warnings = []
    assert pictures(disk, warnings) == {} and warnings == []


def test_words_of_a_label_that_lists_values_stay_whole(disk):
    for levels in ([24, 16], [20, 12, 16]):
        keys = LPC | {"model": "hierarchical", "hidden": f"[{levels[0]}, 512]", "levels": str(levels)}
        disk.run(str(len(levels)), keys, 0)
    groups = read_study(disk.study).groups
    titles = short_labels(groups, lambda group: group.method)
    assert sorted(titles) == [
        "LPC jeffreys, hidden=[20, 512], levels=[20, 12, 16]",
        "LPC jeffreys, hidden=[24, 512], levels=[24, 16]",
    ]
    assert "levels=[20, 12, 16]" in wrapped(titles[0], 24) + wrapped(titles[1], 24)
