// A page that is served: runs that are being trained grow, and what is said of a run is read again when it has changed.
"use strict";
(() => {
  const {data, $, on, emit, get} = tiltflow, EVERY = 2000;
  const say = (text, bad = false) => { const place = $("#state"); place.textContent = text; place.classList.toggle("bad", bad); };
  const states = () => {
    const training = data.runs.filter((run) => run.state === "training");
    say(training.length ? `training: ${training.map((run) => run.name).join(", ")}` : "");
  };
  const append = (run, more) => {  // a run that was resumed from an earlier step is read from the beginning
    const known = run.axes.step.at(-1) ?? 0;
    if (more.from !== known && more.from !== 0) return false;
    for (const [name, values] of Object.entries(more.axes)) run.axes[name] = more.from ? [...run.axes[name], ...values] : values;
    for (const [name, curve] of Object.entries(more.curves)) {
      const before = run.curves[name];
      if (more.from && !before) return false;
      for (const part of ["values", "spread"]) {
        if (curve[part]) curve[part] = more.from ? [...(before[part] || []), ...curve[part]] : curve[part];
      }
    }
    Object.assign(run, {curves: more.curves, looks: more.looks, state: more.state, target: more.target});
    return true;
  };
  const read = async (run) => {
    let more = await get("run", {at: run.key, after: run.axes.step.at(-1) ?? 0});
    if (!append(run, more)) append(run, more = await get("run", {at: run.key}));
    const changed = run.stamp !== more.stamp;
    run.stamp = more.stamp;
    if (more.axes.step.length) emit("curves");
    if (changed) emit("changed", run);
  };
  const show = async (shown) => {
    const {html} = await get("report", {at: shown});
    $("#report").innerHTML = html;
    data.shown = shown;
    emit("article");
    emit("run", tiltflow.shown());
  };
  on("show", (key) => show(key).catch((error) => say(error.message, true)));
  on("changed", (run) => { if (run.key === data.shown) emit("show", run.key); });
  const loop = async () => {
    try {
      if (!document.hidden) {
        for (const run of data.runs) if (run.state === "training" || run.state === "waiting") await read(run);
        states();
      }
    } catch (error) {
      say(error instanceof TypeError ? "tiltflow view has stopped" : error.message, true);
    }
    setTimeout(loop, EVERY);
  };
  states();
  setTimeout(loop, EVERY);
})();
