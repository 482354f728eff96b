"Sphinx settings. `docs/build` stages the notebooks and calls Sphinx; nothing needs a network when built or read."

import gc
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

settings = ConfigParser(delimiters=["="])
settings.read(Path(__file__).parent.parent / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

project, author, release = settings["title"], settings["author"], settings["version"]
copyright = settings["copyright"]
extensions = ["myst_nb"]
exclude_patterns = ["figures/*.md"]  # reports to be read in the repository; their pictures are used

# notebooks are committed executed: they are shown as they are
nb_execution_mode = "off"
nb_merge_streams = True
nb_output_stderr = "remove"
nb_code_prompt_show = "Code"
nb_code_prompt_hide = "Hide the code"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
myst_dmath_double_inline = True
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header"]

# MathJax 3 as one file that draws SVG: no fonts to fetch, so it works from file:// in every browser
math = Path(import_module("sphinx-mathjax-offline").__file__).parent / "static" / "mathjax" / "tex-svg-full.js"
extensions.append("sphinx.ext.mathjax")
mathjax_path = "tex-svg-full.js"
mathjax3_config = {"options": {"enableMenu": False}, "svg": {"fontCache": "global"}}

html_theme = "furo"
html_title = project
html_static_path = [str(math), "site.css"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_show_search_summary = False  # it would fetch pages, which browsers refuse from file://
html_show_sphinx = False
html_theme_options = {"footer_icons": []}
pygments_style = "default"  # its comments have enough contrast
toc_object_entries_show_parents = "hide"
add_module_names = False


def setup(app):
    "Keep the garbage collector off what was read: it is needed to the end, and every pass over it takes a second."
    gc.disable()

    def keep(*_):
        gc.freeze()
        gc.enable()

    app.connect("env-updated", keep)
    app.connect("build-finished", lambda *_: gc.unfreeze())
