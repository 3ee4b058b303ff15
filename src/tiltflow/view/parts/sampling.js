// Samples of the run that is shown, at any strength of its tilt: the slider asks, and of what it asks meanwhile the last counts.
"use strict";
(() => {
  const {element, section, get, post, on, shown, key} = tiltflow;
  const FIELD = "font:inherit;color:var(--ink);background:var(--card);border:1px solid var(--edged);border-radius:8px;padding:3px 8px;min-height:32px;";
  let options = null, asked = null, busy = false, seed = 0;

  const strength = element("input", {type: "range", id: "strength", min: "0", max: "1.5", step: "0.05", value: "1", list: "ends", oninput: () => draw()});
  const number = element("output", {for: "strength"});
  const condition = element("span", {hidden: true});
  const count = element("select", {"aria-label": "number of samples", onchange: () => draw()},
    ...[1, 4, 16, 36, 64].map((n) => element("option", {value: n}, `${n} sample${n > 1 ? "s" : ""}`)));
  const steps = element("input", {type: "number", id: "steps", min: "1", max: "1000", style: FIELD + "width:5.5em", onchange: () => draw()});
  const picture = element("img", {alt: "", hidden: true, style: "width:100%;max-width:640px;border-radius:8px",
    onload: () => { picture.style.imageRendering = picture.naturalWidth > 640 ? "auto" : "pixelated"; }});  // of few pixels
  const said = element("p", {class: "note", role: "status"});
  const command = element("pre", {hidden: true, tabindex: "0"});
  const text = () => {
    const value = Number(strength.value);
    number.value = value.toFixed(2) + (value === 0 ? ", the base" : value === 1 ? ", as tuned" : "");
    strength.setAttribute("aria-valuetext", number.value);
  };

  const made = section({
    id: "sampling", title: "Draw samples",
    note: "From the base at 0 to the tuned model at 1, and beyond, with the same noise: a LoRA is scaled, other weights lie on a"
      + " straight line between the two. A heuristic: not the law at another temperature.",
    mount: (place) => place.append(
      element("div", {class: "controls"}, element("label", {for: "strength"}, "strength of the tilt"), strength,
        element("datalist", {id: "ends"}, element("option", {value: "0"}), element("option", {value: "1"})), number),
      element("div", {class: "controls"}, condition, count, element("label", {for: "steps"}, "steps"), steps,
        element("button", {type: "button", onclick: () => { seed += 1; draw(); }}, "new noise"),
        element("button", {type: "button", onclick: () => draw()}, "draw")),
      picture, said, command),
  });
  made.hidden = true;

  const chosen = () => made.querySelector("#condition");
  const wanted = () => ({
    tilt_strength: Number(strength.value), condition: chosen()?.value || null, num_samples: Number(count.value),
    num_inference_steps: Number(steps.value) || null, seed,
  });
  const draw = async () => {
    text();
    if (!options) return;
    asked = {key: shown().key, body: wanted()};
    if (busy) return;
    busy = true;
    while (asked) {
      const {key, body} = asked;
      asked = null;
      said.textContent = picture.hidden ? "loading the model, and sampling …" : "sampling …";
      try {
        const found = await post(`sampling/draw?at=${encodeURIComponent(key)}`, body);
        if (shown()?.key !== key) continue;
        const what = body.tilt_strength === 0 ? "of the base" : `at strength ${body.tilt_strength}`;
        Object.assign(picture, {src: found.picture, hidden: false, alt: `${body.num_samples} samples ${what}`});
        said.textContent = `${found.seconds.toFixed(1)} s. The same samples, from the command line:`;
        Object.assign(command, {textContent: found.command, hidden: false});
      } catch (error) {
        said.textContent = error instanceof TypeError ? "tiltflow view has stopped" : error.message;
      }
    }
    busy = false;
  };

  const ask = async (run) => {
    options = null;
    made.hidden = true;
    if (!run) return;
    let found;
    try {
      found = await get("sampling/options", {at: run.key});
    } catch { return; }
    if (shown()?.key !== run.key || found.none) return;  // it has no tuned model yet, or no pictures
    options = found;
    const names = options.classes.map((name) => element("option", {value: name}, name));
    condition.replaceChildren(...(
      options.prompts
        ? [element("input", {type: "search", id: "condition", list: "prompts", "aria-label": "prompt", value: options.prompts[0] || "",
            placeholder: "a prompt", style: "width:min(28em,80vw)", onchange: () => draw()}),
          element("datalist", {id: "prompts"}, ...options.prompts.map((prompt) => element("option", {value: prompt})))]
        : names.length
          ? [element("select", {id: "condition", "aria-label": "class", onchange: () => draw()}, element("option", {value: ""}, "all classes"), ...names)]
          : []));
    condition.hidden = !condition.childElementCount;
    [strength.value, steps.value, count.value] = [1, options.num_inference_steps, options.num_samples];
    picture.hidden = command.hidden = true;
    said.textContent = "";
    text();
    made.hidden = false;
  };
  on("run", ask);
  ask(shown());
  key("t", "draw samples: to the slider of the tilt's strength", () => {
    if (made.hidden) return false;
    made.scrollIntoView({block: "start"});
    strength.focus();
    if (picture.hidden) draw();
  });
})();
