// Curves of runs: of training over steps, time or network evaluations, and of the monitor's looks, by uPlot.
"use strict";
(() => {
  const {data, $, $$, element, on, key, store, colour} = tiltflow;
  const AXES = {step: "iteration", seconds: "seconds", network_evaluations: "network evaluations"};
  const SERIES = 8, LOG = 50;
  const settings = {smoothing: Number(store.read("smoothing") ?? 5), axis: "step", hidden: new Set()};
  const charts = new Map();  // by element
  const several = () => data.runs.length > 1;

  // ---- numbers ----
  const known = (value) => value !== null && value !== undefined;
  const text = (value) => !known(value) ? "–" : (Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3)
    ? value.toExponential(1) : String(Number(value.toPrecision(3)))).replace("-", "−");
  const smoothed = (values, half) => {  // mean of 2 half + 1 points, fewer at the ends
    if (!half) return values;
    const sums = [0], counts = [0];
    values.forEach((value, i) => { sums.push(sums[i] + (known(value) ? value : 0)); counts.push(counts[i] + known(value)); });
    return values.map((value, i) => {
      const from = Math.max(0, i - half), to = Math.min(values.length, i + half + 1), count = counts[to] - counts[from];
      return known(value) && count ? (sums[to] - sums[from]) / count : null;
    });
  };
  const half = (count) => Math.round(count * settings.smoothing / 200);

  // ---- what a chart shows: for each run that has it x, y, and what is beside ----
  const paint = (run) => several() ? `s${data.runs.indexOf(run) % SERIES}` : "tuned";
  const dash = (run) => data.runs.indexOf(run) >= SERIES ? [6, 3] : [];
  const visible = () => data.runs.filter((run) => !settings.hidden.has(run.key));
  const ofTraining = (name) => visible().filter((run) => run.curves[name]).map((run) => {
    const {values, spread, target} = run.curves[name], smooth = smoothed(values, half(values.length));
    const wide = spread && !several() ? smoothed(spread, half(values.length)) : null;
    const {alarm, best} = settings.axis === "step" ? run.looks : {};
    return {run, name, alarm, best, x: run.axes[settings.axis], raw: settings.smoothing ? values : null, values: smooth, target,
      band: wide && [smooth.map((y, i) => known(y) && known(wide[i]) ? y - wide[i] : null),
        smooth.map((y, i) => known(y) && known(wide[i]) ? y + wide[i] : null)]};
  });
  const ofLooks = (name) => visible().filter((run) => run.looks.measures[name]).map((run) => {
    const {values, errors, target} = run.looks.measures[name];
    return {run, x: run.looks.steps, raw: null, values, errors, target, alarm: run.looks.alarm, best: run.looks.best};
  });

  // ---- drawing ----
  const line = (u, from, to, paint, dashes, width) => {
    const pen = u.ctx;
    pen.save();
    pen.beginPath(); pen.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height); pen.clip();
    pen.beginPath(); pen.strokeStyle = paint; pen.lineWidth = width * devicePixelRatio;
    pen.setLineDash(dashes.map((each) => each * devicePixelRatio));
    pen.moveTo(...from); pen.lineTo(...to); pen.stroke();
    pen.restore();
  };
  const marks = (lines) => (u) => {
    const {left, top, width, height} = u.bbox;
    const up = (x, paint, dashes) => { const at = u.valToPos(x, "x", true); line(u, [at, top], [at, top + height], paint, dashes, 1.6); };
    for (const each of lines) {
      if (known(each.target)) {
        const at = u.valToPos(each.target, "y", true);
        line(u, [left, at], [left + width, at], colour(several() ? paint(each.run) : "target"), [4, 3], 1.6);
      }
      if (known(each.alarm)) up(each.alarm, colour(several() ? paint(each.run) : "poor"), []);
      if (known(each.best)) up(each.best, colour(several() ? paint(each.run) : "good"), [2, 3]);
      (each.errors || []).forEach((error, i) => {
        if (!known(error) || !known(each.values[i])) return;
        const at = u.valToPos(each.x[i], "x", true);
        const ends = [-1, 1].map((sign) => u.valToPos(each.values[i] + sign * error, "y", true));
        line(u, [at, ends[0]], [at, ends[1]], colour(paint(each.run)), [], 1);
      });
    }
  };
  const read = (values) => (u, value, series, index) => text(index === null || index === undefined ? values.findLast(known) : value);
  const tables = (lines, looks) => {  // of uPlot: the same x for all, and a series for each line
    const parts = [], series = [{label: looks ? "iteration" : AXES[settings.axis], value: read([Math.max(...lines.map((each) => each.x.at(-1)))])}], bands = [];
    for (const each of lines) {
      const shade = colour(paint(each.run)), faint = shade.replace("rgb(", "rgba(").replace(")", ", .35)");
      const add = (values, options) => { parts.push([each.x, values]); series.push({spanGaps: true, points: {show: false}, ...options}); };
      if (each.band) {
        add(each.band[1], {class: "unlisted", width: 0}); add(each.band[0], {class: "unlisted", width: 0});
        bands.push({series: [series.length - 2, series.length - 1], fill: faint.replace(".35", ".14")});
      }
      if (each.raw) add(each.raw, {class: "unlisted", stroke: faint, width: 1});
      add(each.values, {label: several() ? each.run.name : "value", stroke: shade, width: 2, dash: dash(each.run),
        value: read(each.values), points: {show: looks || each.x.length < 3, size: 6, fill: shade}});
    }
    return {table: parts.length ? uPlot.join(parts.map(([x, y]) => [x, y])) : [[]], series, bands};
  };
  const logarithmic = (lines) => {
    const all = lines.flatMap((each) => each.values.filter(known));
    return !lines.some((each) => each.run.curves[each.name].spread) && all.length > 0 && Math.min(...all) > 0 && Math.max(...all) > LOG * Math.min(...all);
  };
  const draw = (card) => {
    const looks = card.dataset.kind === "looks", place = $(".plot", card), name = card.dataset.name;
    const lines = looks ? ofLooks(name) : ofTraining(name), before = charts.get(card), log = !looks && logarithmic(lines);
    const zoom = before && before.zoomed ? {min: before.scales.x.min, max: before.scales.x.max} : null;
    before?.destroy();
    charts.delete(card);
    card.classList.toggle("empty", !lines.length);
    if (!lines.length) return place.replaceChildren(element("p", {class: "note"}, "no values yet"));
    const {table, series, bands} = tables(lines, looks);
    const axis = {stroke: colour("soft"), grid: {stroke: colour("line"), width: 1}, ticks: {show: false}, font: "12px system-ui, sans-serif"};
    const bars = lines.flatMap((each) => (each.errors || []).flatMap((error, i) =>
      known(error) && known(each.values[i]) ? [each.values[i] - error, each.values[i] + error] : []));
    const beside = [...lines.map((each) => each.target).filter(known), ...bars];
    place.replaceChildren();
    const chart = new uPlot({
      width: place.clientWidth, height: 180, series, bands,
      cursor: {sync: {key: looks ? "looks" : "training"}, drag: {x: true, y: false}, points: {size: 7}},
      legend: {live: true, markers: {width: 2}},
      scales: {
        x: {time: false, range: (u, low, high) => looks ? [low - 0.02 * (high - low), high + 0.02 * (high - low)] : [low, high]},
        y: {distr: log ? 3 : 1, range: log ? undefined : (u, low, high) =>
          uPlot.rangeNum(Math.min(low, ...beside), Math.max(high, ...beside), 0.1, true)},
      },
      padding: [8, 8, 0, 0],
      axes: [{...axis, grid: {show: false}, values: (u, all) => all.map(compact), space: 60, size: 26},
        {...axis, values: (u, all) => all.map((value) => value === null ? "" : compact(value)), size: 52, ...(log ? decades() : {})}],
      hooks: {draw: [marks(lines)], setScale: [(u, scale) => {
        if (scale === "x" && u.data) u.zoomed = u.scales.x.min > u.data[0][0] || u.scales.x.max < u.data[0].at(-1);
      }]},
    }, table, place);
    if (zoom) chart.setScale("x", zoom);
    charts.set(card, chart);
  };
  const tens = (u, all) => all.map((value) => Math.abs(Math.log10(value) % 1) < 1e-9 ? value : null);
  const decades = () => ({filter: tens, grid: {stroke: colour("line"), width: 1, filter: tens}});
  const compact = (value) => Math.abs(value) >= 1e4 ? `${Number((value / 1e3).toPrecision(4))}k`.replace("000k", "M")
    : value && Math.abs(value) < 1e-3 ? value.toExponential(0).replaceAll("-", "−") : String(Number(value.toPrecision(6))).replace("-", "−");
  const cards = () => $$(".chart").filter((card) => card.offsetParent !== null);
  const redraw = () => cards().forEach(draw);

  // ---- controls ----
  const reset = () => charts.forEach((chart) => chart.setData(chart.data, true));
  const controls = (place) => {
    const points = Math.max(0, ...data.runs.map((run) => run.axes.step.length * run.steps_per_point));
    const said = element("output", {}), say = () => {
      said.textContent = settings.smoothing && points ? `mean of ${2 * Math.round(points * settings.smoothing / 200) + 1}` : "none";
    };
    say();
    const slider = element("input", {type: "range", min: 0, max: 30, step: 1, value: settings.smoothing, id: "smoothing",
      oninput: (event) => { settings.smoothing = Number(event.target.value); store.write("smoothing", settings.smoothing); say(); redraw(); }});
    const axis = element("select", {id: "axis", onchange: (event) => { settings.axis = event.target.value; redraw(); }},
      ...Object.entries(AXES).map(([name, title]) => element("option", {value: name, selected: name === settings.axis}, title)));
    place.replaceChildren(
      element("label", {for: "smoothing"}, "smoothing"), slider, said, element("label", {for: "axis"}, "over"), axis,
      element("button", {type: "button", onclick: reset}, "whole curves"), picker());
    place.hidden = false;
  };
  const picker = () => {
    const off = new Set((store.read("metrics-off") || "").split(" "));
    const apply = (card) => { card.hidden = off.has(card.dataset.name); };
    const all = $$(".chart[data-kind=training]");
    all.forEach(apply);
    return element("details", {class: "pick"}, element("summary", {}, "metrics"), ...all.map((card) => element("label", {},
      element("input", {type: "checkbox", checked: !card.hidden, onchange: (event) => {
        off[event.target.checked ? "delete" : "add"](card.dataset.name);
        store.write("metrics-off", [...off].join(" "));
        apply(card);
        if (!card.hidden) draw(card);
      }}), $("h3", card).textContent)));
  };

  document.addEventListener("click", (event) => {
    const swatch = event.target.closest(".swatch");
    if (!swatch) return;
    const hide = !settings.hidden.has(swatch.dataset.run);
    settings.hidden[hide ? "add" : "delete"](swatch.dataset.run);
    swatch.setAttribute("aria-pressed", !hide);
    redraw();
  });

  // ---- keys: a chart that has the focus is read with the arrows ----
  const walk = (event) => {
    const card = event.target.closest(".chart"), chart = card && charts.get(card);
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!chart || !step) return;
    event.preventDefault();
    const [x] = chart.data, shown = x.filter((each) => each >= chart.scales.x.min && each <= chart.scales.x.max);
    const first = x.indexOf(shown[0]), now = chart.cursor.idx ?? (step > 0 ? first - 1 : first + shown.length);
    const index = Math.min(first + shown.length - 1, Math.max(first, now + step * Math.max(1, Math.round(shown.length / 100))));
    chart.setCursor({left: chart.valToPos(x[index], "x"), top: 20});
  };
  document.addEventListener("keydown", walk);
  const smoother = (change) => () => {
    settings.smoothing = Math.min(30, Math.max(0, settings.smoothing + change));
    store.write("smoothing", settings.smoothing);
    $$(".of-curves").forEach(controls);
    redraw();
  };
  key("s", "smoother curves", smoother(5));
  key("S", "less smooth", smoother(-5));
  key("z", "whole curves again, after a zoom by a drag", reset);
  key("x", "curves over iterations, time, or network evaluations", () => {
    const names = Object.keys(AXES);
    settings.axis = names[(names.indexOf(settings.axis) + 1) % names.length];
    $$(".of-curves").forEach(controls);
    redraw();
  });

  const begin = () => {
    $$(".swatch").forEach((swatch) => swatch.setAttribute("aria-pressed", !settings.hidden.has(swatch.dataset.run)));
    $$(".of-curves").forEach(controls);
    redraw();
  };
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(); } });
  on("theme", redraw);
  on("curves", redraw);
  on("article", () => { charts.clear(); begin(); });
  tiltflow.charts = charts;
  begin();
})();
