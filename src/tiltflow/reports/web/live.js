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
    Object.assign(run, {curves: more.curves, looks: more.looks, state: more.state});
    return true;
  };
  const read = async (run) => {
    let more = await get("run", {at: run.key, after: run.axes.step.at(-1) ?? 0});
    if (!append(run, more)) append(run, more = await get("run", {at: run.key}));
    const changed = run.stamp !== more.stamp;
    run.stamp = more.stamp;
    if (more.axes.step.length) emit("curves");
    return changed;
  };
  const article = async () => {
    const {html} = await get("report", {at: data.shown});
    $("#report").innerHTML = html;
    emit("article");
    emit("run", tiltflow.shown());
  };
  const look = async () => {  // runs that are new, have grown, or have ended
    const {runs, stamp} = await get("place", {at: data.shown});
    const known = new Map(data.runs.map((run) => [run.key, run]));
    let changed = stamp !== data.stamp || runs.length !== data.runs.length;
    data.stamp = stamp;
    data.runs = await Promise.all(runs.map(({key}) => known.get(key) || get("run", {at: key})));
    for (const [i, {key, state}] of runs.entries()) {
      changed ||= !known.has(key);
      if (["training", "waiting"].includes(state) || state !== data.runs[i].state) changed = await read(data.runs[i]) || changed;
    }
    if (changed) await article();
  };
  const loop = async () => {
    try {
      if (!document.hidden) {
        await look();
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
