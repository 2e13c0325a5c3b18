// What a page does: draws the figures that it brings, keeps them up to date, and listens to keys.
// The report brings the same file; there, nothing is asked for.
"use strict";

(() => {
  const read = (id) => {
    const element = document.getElementById(id);
    return element ? JSON.parse(element.textContent) : null;
  };
  let facts = read("facts-of-page"), figures = read("bokeh");
  const live = () => ["run", "figures"].includes(document.body.dataset.page);
  const LOOK_MS = 1000, DOZE_MS = 10000, SETTLE_MS = 150;

  // Light or dark: as was chosen here last, else as the machine has it.
  const remembered = () => { try { return localStorage.getItem("scheme"); } catch { return null; } };
  const remember = (scheme) => { try { localStorage.setItem("scheme", scheme); } catch { /* a file */ } };
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  let scheme = remembered() || (system.matches ? "dark" : "light");
  system.addEventListener("change", () => { if (!remembered()) paint(system.matches ? "dark" : "light"); });

  function paint(wanted) {
    scheme = wanted;
    document.documentElement.classList.toggle("dark", scheme === "dark");
    const button = document.getElementById("scheme");
    if (button) button.textContent = scheme === "dark" ? "light" : "dark";
    for (const plot of plots()) paintPlot(plot, facts.themes[scheme]);
    for (const renderer of plots().flatMap((plot) => plot.renderers)) {
      const colours = renderer.glyph.color_mapper;
      if (colours) colours.palette = facts.themes[scheme][renderer.name.split(" ").pop()];
    }
  }

  function paintPlot(plot, theme) {
    for (const place of [plot.left, plot.right, plot.above, plot.below, plot.center]) {
      for (const part of place) {
        const has = (name) => part.properties && name in part.properties;
        for (const name of ["axis_label_text_color", "major_label_text_color", "title_text_color", "label_text_color"]) {
          if (has(name)) part[name] = name.startsWith("axis") || name.startsWith("title") ? theme.quiet : theme.text;
        }
        for (const name of ["axis_line_color", "major_tick_line_color", "minor_tick_line_color", "bar_line_color"]) {
          if (has(name) && part[name] !== null) part[name] = theme.quiet;
        }
        if (has("grid_line_color")) part.grid_line_color = theme.grid;
        for (const name of ["background_fill_color", "inactive_fill_color"]) {
          if (has(name)) part[name] = theme.background;
        }
      }
    }
  }

  const drawn = () => window.Bokeh && Bokeh.documents.length ? Bokeh.documents[0] : null;
  const model = (name) => drawn().get_model_by_name(name);
  const plots = () => drawn() ? drawn().roots() : [];

  // The range of steps is in the address, and in every link that keeps it.
  let range = null, whole = null, following = false, version = facts ? facts.version : 0, timer = null;
  let settling = null, asked = 0;

  const asQuery = () => {
    const found = new URLSearchParams();
    if (!range || isWhole()) return found;
    found.set("from", Math.round(range.start));
    if (!following) found.set("to", Math.round(range.end));
    return found;
  };
  const isWhole = () => whole && range.start <= whole[0] && range.end >= whole[1];

  function tellRange() {
    const output = document.getElementById("range");
    if (output && range) output.textContent = `steps ${Math.round(range.start).toLocaleString("en")} to ${Math.round(range.end).toLocaleString("en")}`;
    const query = new URLSearchParams(location.search);
    query.delete("from"); query.delete("to");
    for (const [name, value] of asQuery()) query.set(name, value);
    if (location.protocol !== "file:") history.replaceState(null, "", `?${query}`);
    keepLinks();
  }
  function keepLinks() {
    for (const link of document.querySelectorAll("a.keep")) {
      const url = new URL(link.href);
      url.searchParams.delete("from"); url.searchParams.delete("to");
      for (const [name, value] of asQuery()) url.searchParams.set(name, value);
      link.href = url.href;
    }
    const follow = document.querySelector("[data-do=follow]");
    if (follow) follow.setAttribute("aria-pressed", String(following));
  }
  function show(start, end) {
    const least = 4, [first, last] = whole;
    let width = Math.min(Math.max(end - start, least), Math.max(last - first, least));
    start = Math.min(Math.max(start, first), Math.max(last - width, first));
    range.setv({ start, end: start + width });
  }
  const zoom = (factor) => {
    const middle = (range.start + range.end) / 2, half = (range.end - range.start) / 2 * factor;
    following = false; show(middle - half, middle + half);
  };
  const pan = (share) => {
    const by = (range.end - range.start) * share;
    following = false; show(range.start + by, range.end + by);
  };
  const toFinding = (direction) => {
    const middle = (range.start + range.end) / 2, findings = facts.findings || [];
    const next = direction > 0 ? findings.find((step) => step > middle + 0.5) : findings.findLast((step) => step < middle - 0.5);
    if (next === undefined) return;
    const half = Math.min((range.end - range.start) / 2, 100);
    following = false; show(next - half, next + half);
  };
  const actions = {
    whole: () => { following = facts.live; show(...whole); },
    in: () => zoom(0.5), out: () => zoom(2),
    earlier: () => pan(-0.5), later: () => pan(0.5),
    follow: () => { following = !following; if (following) show(range.start + whole[1] - range.end, whole[1]); tellRange(); },
  };

  // What is new, of the range that is shown.
  function ask(everything) {
    if (!live() || !facts.name || location.protocol === "file:") return;
    clearTimeout(timer);
    const number = ++asked, query = asQuery();
    query.set("r", facts.name);
    query.set("version", everything ? 0 : version);
    if ("layer" in facts) query.set("layer", facts.layer);
    fetch(`news?${query}`, { cache: "no-store" }).then(async (answer) => {
      if (answer.status === 204) return tell("");
      if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
      const news = await answer.json();
      if (number !== asked) return;
      take(news); tell("");
    }).catch(() => tell("no answer from gradwatch serve; trying again", true)).finally(() => {
      if (number === asked) later();
    });
  }
  function later() {
    clearTimeout(timer);
    timer = setTimeout(() => document.hidden ? later() : ask(false), facts.live ? LOOK_MS : DOZE_MS);
  }
  function tell(text, lost = false) {
    const status = document.getElementById("link");
    if (!status) return;
    const said = text || (facts?.live ? "live" : "");
    if (status.textContent !== said) status.textContent = said;
    status.classList.toggle("lost", lost);
  }
  function take(news) {
    version = news.version;
    const isNew = (name) => facts.told_of && news.told_of && !facts.told_of.includes(name);
    if ((!range && news.last >= 0) || (news.told_of || []).some(isNew)) return location.reload();
    const grown = whole && news.last > whole[1];
    facts.live = news.live;
    if (news.now) document.getElementById("now").innerHTML = news.now;
    if (news.tables) document.getElementById("tables").innerHTML = news.tables;
    if (range) {
      const sources = news.columns || {};
      const events = Object.entries(sources).filter(([name]) => model(name)).map(([name, data]) => ({
        kind: "ModelChanged", model: { id: model(name).id }, attr: "data", new: data,
      }));
      drawn().apply_json_patch({ events });
      tidyLegends();
      if (news.absolute) model("colours absolute")?.setv({ low: news.absolute[0] - 1e-3, high: news.absolute[1] });
      const wasWhole = isWhole();
      whole = [news.first, Math.max(news.last, news.first + 1)];
      if (grown && (following || wasWhole)) {
        moving = true;
        range.setv(wasWhole ? { start: whole[0], end: whole[1] } : { start: range.start + news.last - range.end, end: news.last });
        moving = false;
        for (const plot of plots()) rememberReset(plot);
      }
      keepLinks();
    }
    document.dispatchEvent(new CustomEvent("gradwatch:news"));
  }
  // An entry of a legend whose symbol has nowhere to be says nothing.
  function tidyLegends() {
    for (const plot of plots()) for (const { items } of plot.above) for (const item of items || []) {
      const shows = item.renderers.some(({ data_source, glyph }) => {
        for (const value of data_source.data[glyph.y?.field] || []) if (Number.isFinite(value)) return true;
        return false;
      });
      if (item.visible !== shows) item.visible = shows;
    }
  }

  let moving = false;
  function rangeChanged() {
    tellRange();
    if (moving) return;
    clearTimeout(settling);
    settling = setTimeout(() => ask(true), SETTLE_MS);
  }
  const rememberReset = () => range.setv({ reset_start: whole[0], reset_end: whole[1] });

  // The cell under the mouse, in words; a click leads to it.
  function readHeat(plot) {
    const output = document.querySelector("[data-readout=heat]"), source = model("heat");
    const at = (event) => {
      const row = Math.round(event.y), layers = facts.layers || [];
      if (row < 0 || row >= layers.length) return null;
      const width = source.data.dw[0], picture = source.data.absolute[0], [rows, columns] = picture.shape;
      const column = Math.floor((event.x - source.data.x[0]) / width * columns);
      const together = source.data.dh[0] / rows, place = Math.floor(row / together) * columns + column;
      if (column < 0 || column >= columns) return null;
      const { left, right } = model("learning").data, away = source.data.departure[0][place];
      const learning = left.length && event.x >= left[0] && event.x < right[0] && away === 0;
      return { row, step: Math.round(event.x), norm: picture[place], away: learning ? null : away, together };
    };
    plot.on_event("mousemove", (event) => {
      const cell = at(event);
      if (!cell || !output) return;
      const others = cell.together > 1 ? " and its neighbours" : "";
      const norm = Number.isNaN(cell.norm) ? "not finite" : cell.norm < -90 ? "nothing recorded"
        : `norm ${(10 ** cell.norm).toPrecision(3)}, ${cell.away === null ? "while its usual is learnt" : `${(10 ** cell.away).toPrecision(3)} times its usual`}`;
      output.textContent = `step ${cell.step.toLocaleString("en")}, ${facts.layers[cell.row]}${others}: ${norm}`;
    });
    plot.on_event("tap", (event) => {
      const cell = at(event);
      if (!cell || location.protocol === "file:") return;
      const query = asQuery();
      query.set("r", facts.name); query.set("layer", cell.row);
      location.href = `layer?${query}`;
    });
  }
  function showHeat(kind) {
    for (const other of ["departure", "absolute"]) {
      const shown = other === kind;
      for (const part of plots().flatMap((plot) => [...plot.renderers, ...plot.right])) {
        if (/(picture|bar) \w+$/.test(part.name || "") && part.name.endsWith(other)) part.visible = shown;
      }
      document.querySelector(`[data-heat=${other}]`)?.setAttribute("aria-pressed", String(shown));
    }
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.do && range) actions[button.dataset.do]();
    if (button.dataset.heat && drawn()) showHeat(button.dataset.heat);
    if (button.id === "scheme") { paint(scheme === "dark" ? "light" : "dark"); remember(scheme); }
    if (button.id === "help") document.getElementById("keys").showModal();
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) return;
    const keys = {
      "+": "in", "=": "in", "-": "out", "ArrowLeft": "earlier", "ArrowRight": "later", "0": "whole", "f": "follow",
    };
    if (event.key === "?") document.getElementById("keys")?.showModal();
    else if (event.key === "d") document.getElementById("scheme")?.click();
    else if (event.key === "u" && location.protocol !== "file:") {
      const up = [...document.querySelectorAll("nav a")].pop() || document.querySelector(".home");
      if (up) location.href = up.href;
    }
    else if (range && keys[event.key]) { actions[keys[event.key]]?.(); event.preventDefault(); }
    else if (range && (event.key === "n" || event.key === "p")) toFinding(event.key === "n" ? 1 : -1);
    else if (drawn() && event.key === "h" && model("picture departure")) showHeat(model("picture departure").visible ? "absolute" : "departure");
  });

  function watchList() {
    const place = document.getElementById("runs");
    const look = () => {
      const again = () => setTimeout(() => document.hidden ? again() : look(), 2000);
      fetch("list", { cache: "no-store" }).then(async (answer) => {
        if (!answer.ok) throw new Error();
        const chosen = new Set([...place.querySelectorAll("input:checked")].map((box) => box.value));
        const focused = document.activeElement?.closest?.("#runs a, #runs input");
        const key = focused && (focused.href || focused.value);
        const text = await answer.text();
        if (text !== place.dataset.text) {
          place.innerHTML = text; place.dataset.text = text;
          for (const box of place.querySelectorAll("input")) box.checked = chosen.has(box.value);
          if (key) [...place.querySelectorAll("a, input")].find((one) => (one.href || one.value) === key)?.focus();
        }
        tell("live");
      }).catch(() => tell("no answer from gradwatch serve; trying again", true)).finally(again);
    };
    setTimeout(look, 1000);
  }

  // Figures come without their steps, which are put into their description before it is drawn.
  function fill(part) {
    if (part === null || typeof part !== "object") return;
    const attributes = part.attributes, { columns, absolute, steps } = facts.filled;
    if (attributes && part.name === "ColumnDataSource" && columns[attributes.name]) attributes.data = columns[attributes.name];
    else if (attributes && attributes.name === "steps") [attributes.start, attributes.end] = steps;
    else if (attributes && attributes.name === "colours absolute") [attributes.low, attributes.high] = [absolute[0] - 1e-3, absolute[1]];
    for (const inner of Object.values(part)) fill(inner);
  }

  // A long recording that was not read yet: its page comes once it is, while Bokeh gets ready here.
  async function arrive(main) {
    while (main.dataset.later) {
      try {
        const answer = await fetch(main.dataset.later, { cache: "no-store" });
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        main.replaceChildren(...page.getElementById("main").childNodes);
        document.querySelector("nav").replaceChildren(...page.querySelector("nav").childNodes);
        document.title = page.title;
        document.body.dataset.page = page.body.dataset.page;
        delete main.dataset.later;
        tell("");
      } catch {
        tell("no answer from gradwatch serve; trying again", true);
        await new Promise((done) => setTimeout(done, LOOK_MS));
      }
    }
    facts = read("facts-of-page");
    figures = read("bokeh");
    if (facts) version = facts.version;
  }

  async function begin() {
    const main = document.getElementById("main");
    if (main.dataset.later) { paint(scheme); await arrive(main); }
    paint(scheme);
    if (document.body.dataset.page === "list") return watchList();
    if (figures) {
      Bokeh.set_log_level("error");  // it warns of a line that has nothing in this range
      if (facts.filled) fill(figures.docs);
      await Bokeh.embed.embed_items(figures.docs, figures.items);
      tidyLegends();
      range = model("steps");
      whole = [facts.first, Math.max(facts.last, facts.first + 1)];
      following = facts.live && facts.to === null && facts.from !== null;
      rememberReset();
      for (const name of ["start", "end"]) range.properties[name].change.connect(rangeChanged);
      if (model("picture departure")) readHeat(model("figure layers"));
      paint(scheme);
      tellRange();
    }
    document.documentElement.dataset.drawn = "yes";
    if (live()) { tell(""); later(); }
  }
  begin();
})();
