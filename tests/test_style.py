"The look of the figures: one colour a method, colours that differ, the same bytes for the same picture."

import colorsys

import pytest

from rcka import style


def test_a_method_has_one_colour_however_it_is_written():
    assert style.method_color("RCKA") == style.method_color(" rcka") == style.METHOD_COLORS["rcka"]
    assert style.method_color("student alone") == style.method_color("none")
    assert style.method_color("KD + FCKA") == style.method_color("dist+fcka")
    assert style.method_color("no such method") is None


def test_no_two_methods_of_a_plot_share_a_colour():
    names = [*style.METHOD_COLORS, "kd+fcka"]
    assert len({look["color"] for look in style.line_styles(names).values()}) == len(names)


def test_other_names_take_colours_that_no_method_of_the_plot_has():
    looks = style.line_styles(["rcka", "one", "two", "three"])
    assert len({look["color"] for look in looks.values()}) == 4
    assert list(looks) == ["rcka", "one", "two", "three"]
    assert len(style.line_styles(str(i) for i in range(40))) == 40  # more names than colours


def test_colours_of_methods_differ_in_grey_or_in_hue():
    rgb = {name: tuple(int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)) for name, c in style.METHOD_COLORS.items()}
    for a in rgb:
        for b in rgb:
            if a < b:
                grey = abs(sum(w * (x - y) for w, x, y in zip((0.3, 0.59, 0.11), rgb[a], rgb[b])))
                hue = abs(colorsys.rgb_to_hls(*rgb[a])[0] - colorsys.rgb_to_hls(*rgb[b])[0])
                assert grey > 0.05 or min(hue, 1 - hue) > 0.05, (a, b)


def test_the_style_is_one_that_matplotlib_knows():
    mpl = pytest.importorskip("matplotlib")
    with mpl.rc_context():
        style.use_style()
        assert mpl.rcParams["font.size"] == style.RC["font.size"]
        assert [c["color"] for c in mpl.rcParams["axes.prop_cycle"]] == style.PALETTE


def test_beside_methods_a_name_takes_a_colour_that_no_method_has():
    "As RKD and PKT, which have none: not the colour of PCKA or of sums, which other figures show."
    looks = style.line_styles(["kd", "rkd", "pkt"])
    assert not {looks[n]["color"] for n in ("rkd", "pkt")} & {*style.METHOD_COLORS.values(), style.method_color("a+b")}
