// Which is better? Pairs of the run that is shown, before and after tuning, without a word of which is which.
"use strict";
(() => {
  const {element, section, get, post, on, shown, key} = tiltflow;
  let now = null, busy = false;
  const style = element("style", {}, `
    #rating-of-pairs { width: min(1100px, 100vw); max-width: none; max-height: none; padding: 12px 16px; text-align: center; outline: none; }
    #rating-of-pairs > p { margin: 4px auto; overflow-wrap: anywhere; }
    #rating-of-pairs progress { width: 100%; height: 6px; accent-color: var(--tuned); }
    #rating-of-pairs .both { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; margin: 8px 0; }
    #rating-of-pairs .both button { padding: 4px; border-width: 2px; }
    #rating-of-pairs button:hover { border-color: var(--tuned); }
    #rating-of-pairs img { display: block; width: 100%; height: calc(100dvh - 300px); min-height: 110px; object-fit: contain; image-rendering: pixelated; }
    #rating-of-pairs img.large { image-rendering: auto; }
    #rating-of-pairs nav { display: grid; grid-template-columns: repeat(4, 1fr); gap: 8px; }
    #rating-of-pairs nav button { min-height: 48px; padding: 2px; }
    #rating-of-pairs button:disabled { opacity: .45; cursor: default; }
    @media (max-width: 640px) {
      #rating-of-pairs kbd { display: none; }
      #rating-of-pairs .both { grid-template-columns: 1fr; }
      #rating-of-pairs img { height: calc(50dvh - 150px); }
    }`);
  const done = element("progress", {"aria-label": "pairs that are rated", value: "0", max: "1"});
  const prompt = element("p"), place = element("p", {class: "note", "aria-live": "polite"}), problem = element("p", {role: "alert"});
  const images = ["first", "second"].map((which) => element("img", {alt: `the ${which} picture`}));
  const choice = (side, ...children) => element("button", {type: "button", "data-side": side, onclick: () => vote(side)}, ...children);
  const both = element("div", {class: "both"}, ...["left", "right"].map((side, i) => choice(side, images[i])));
  const nav = element("nav", {}, choice("left", "first ", element("kbd", {}, "←")), choice("tie", "equal ", element("kbd", {}, "space")),
    choice("right", "second ", element("kbd", {}, "→")), choice("undo", "undo ", element("kbd", {}, "z")));
  const dialog = element("dialog", {id: "rating-of-pairs", "aria-label": "which is better?", tabindex: "-1"}, style,
    element("h2", {}, "Which is better?"), done, place, prompt, both, nav, problem,
    element("form", {method: "dialog"}, element("button", {}, "close ", element("kbd", {}, "esc"))));
  document.body.append(dialog);

  const summary = element("p"), said = element("p", {class: "note", role: "status"});
  const many = element("select", {"aria-label": "number of pairs"}, ...[20, 50, 100, 200].map((n) => element("option", {value: n}, `${n} pairs`)));
  many.value = "50";
  const start = element("button", {type: "button", onclick: () => begin()}, "rate pairs");
  const made = section({
    id: "rating", title: "Which is better?",
    note: "Pairs from the same noise, one before and one after tuning, on sides by chance: you choose without knowing which is which."
      + " Every vote is saved at once, in votes/ of the run.",
    mount: (at) => at.append(summary, element("div", {class: "controls"}, many, start), said),
  });
  made.hidden = true;

  const route = (name) => `rating/${name}?at=${encodeURIComponent(shown().key)}`;
  const show = (state) => {
    const another = !now || now.pair !== state.pair || now.at !== shown().key;
    now = {...state, at: shown().key};
    const voted = Math.min(state.pair, state.total), ended = state.pair >= state.total;
    summary.textContent = voted ? `${state.words}.` : "Nobody has voted yet.";
    summary.hidden = !state.total;
    many.hidden = state.total > 0;
    start.textContent = !state.total ? "rate pairs" : ended ? "look again" : voted ? `go on, ${state.total - voted} are left` : "rate pairs";
    Object.assign(done, {max: state.total || 1, value: voted});
    place.textContent = ended ? `All ${state.total} pairs are rated: ${state.words}.` : `pair ${state.pair + 1} of ${state.total}`;
    prompt.textContent = state.prompt;
    both.hidden = ended;
    for (const button of nav.children) button.disabled = button.dataset.side === "undo" ? voted === 0 : ended;
    if (dialog.open && !ended && another) {
      ["left", "right"].forEach((side, i) => {
        images[i].onload = () => images[i].classList.toggle("large", images[i].naturalWidth > 200);
        images[i].src = `/api/${route("picture")}&pair=${state.pair}&side=${side}`;
      });
    }
  };
  const word = (error) => (error instanceof TypeError ? "tiltflow view has stopped" : error.message);
  const vote = async (side) => {
    if (busy || !now || (side === "undo" ? now.pair === 0 : now.pair >= now.total)) return;
    busy = true;
    try {
      show(await post(route("vote"), {pair: now.pair, side}));
      problem.textContent = "";
    } catch (error) { problem.textContent = `The vote was not counted: ${word(error)}`; }
    busy = false;
    if (document.activeElement?.disabled) dialog.focus();
  };
  const begin = async () => {
    if (busy || made.hidden) return;
    const from = shown().key;
    busy = true;
    start.disabled = true;
    try {
      if (!now?.total) said.textContent = "loading the model, and sampling pairs …";
      const state = await post(route("begin"), {num_pairs: Number(many.value)});
      said.textContent = "";
      if (shown()?.key === from) {
        now = null;
        dialog.showModal();
        dialog.focus();
        show(state);
      }
    } catch (error) { said.textContent = word(error); }
    busy = false;
    start.disabled = false;
  };
  const keys = {ArrowLeft: "left", ArrowRight: "right", " ": "tie", z: "undo"};
  dialog.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
    event.preventDefault();
    if (!event.repeat) vote(keys[event.key]);
  });
  dialog.addEventListener("keyup", (event) => { if (event.key === " ") event.preventDefault(); });  // it would press a button

  const ask = async (run) => {
    made.hidden = true;
    now = null;
    if (!run) return;
    try {
      const [state] = await Promise.all([get("rating/state", {at: run.key}), get("sampling/options", {at: run.key})]);
      if (shown()?.key !== run.key) return;
      show(state);
      said.textContent = "";
      made.hidden = false;
    } catch { /* it has no tuned model yet, or no pictures */ }
  };
  on("run", ask);
  ask(shown());
  key("r", "rate pairs, blind: which is better?", () => begin());
})();
