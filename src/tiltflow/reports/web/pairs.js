// Samples before and after tuning: sifted by prompt, sorted by reward, and enlarged.
"use strict";
(() => {
  const {$, $$, element, on, key} = tiltflow;
  const dialog = element("dialog", {id: "pair", "aria-label": "a sample before and after tuning"});
  document.body.append(dialog);
  const cells = () => $$(".cell").filter((cell) => cell.offsetParent !== null);
  let now = null;

  const show = (cell) => {
    now = cell;
    const images = $$("img", cell).map((image) => element("figure", {},
      element("img", {class: image.className, src: image.src, alt: image.alt}), element("figcaption", {}, image.classList[0])));
    const close = element("button", {type: "button", onclick: () => dialog.close()}, "close");
    const go = (step, text, name) => element("button", {type: "button", "aria-label": name, onclick: () => move(step)}, text);
    dialog.replaceChildren(element("p", {}, cell.dataset.what), element("div", {class: "large"}, ...images),
      element("p", {class: "note"}, $(".rewards", cell) ? `reward ${$(".rewards", cell).textContent}` : ""),
      element("p", {class: "buttons"}, go(-1, "←", "previous"), go(1, "→", "next"), close));
    if (!dialog.open) dialog.showModal();
  };
  const move = (step) => {
    const all = cells(), at = all.indexOf(now) + step;
    if (all[at]) show(all[at]);
  };
  document.addEventListener("click", (event) => {
    const cell = event.target.closest(".cell");
    if (cell) show(cell);
    if (event.target === dialog) dialog.close();
  });
  dialog.addEventListener("keydown", (event) => {
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (step) { event.preventDefault(); move(step); }
  });
  dialog.addEventListener("close", () => now?.focus());

  const ORDERS = {
    drawn: ["as drawn", null], rise: ["largest rise first", (a, b) => b - a], fall: ["smallest rise first", (a, b) => a - b],
  };
  const sift = (place) => {
    const rows = $$(".pair"), prompts = rows.some((row) => row.dataset.prompt), drawn = $$(".cell");
    const sortable = drawn.some((cell) => cell.dataset.rise !== undefined), parts = [];
    const said = element("output", {});
    if (prompts && rows.length > 1) {
      const filter = (event) => {
        const words = event.target.value.toLowerCase().split(/\s+/);
        rows.forEach((row) => { row.hidden = !words.every((word) => row.dataset.prompt.toLowerCase().includes(word)); });
        const left = rows.filter((row) => !row.hidden).length;
        said.textContent = left < rows.length ? `${left} of ${rows.length} prompts` : "";
      };
      parts.push(element("input", {type: "search", id: "prompt", placeholder: "filter by prompt", "aria-label": "filter by prompt", oninput: filter}), said);
    }
    if (sortable) {
      const home = new Map(drawn.map((cell) => [cell, cell.parentNode]));
      const order = (event) => {
        const [, compare] = ORDERS[event.target.value], rise = (cell) => Number(cell.dataset.rise ?? NaN);
        drawn.forEach((cell) => home.get(cell).append(cell));
        if (!compare) return;
        const groups = $(".pairs.loose") ? [drawn] : rows.map((row) => $$(".cell", row));
        for (const group of groups) {
          const homes = group.map((cell) => cell.parentNode);
          const sorted = [...group].sort((a, b) => isNaN(rise(a)) ? -1 : isNaN(rise(b)) ? 1 : compare(rise(a), rise(b)));
          sorted.forEach((cell, i) => homes[i].append(cell));
        }
      };
      parts.push(element("label", {for: "order"}, "order"), element("select", {id: "order", onchange: order},
        ...Object.entries(ORDERS).map(([name, [title]]) => element("option", {value: name}, title))));
    }
    const loose = $(".pairs.loose");
    if (loose && rows.length > 3) {  // on a phone all of them are a long way down
      loose.classList.add("few");
      const more = element("button", {type: "button", onclick: () => { loose.classList.remove("few"); more.remove(); }},
        `all ${drawn.length} pairs`);
      loose.after(element("p", {}, more));
    }
    place.replaceChildren(...parts);
    place.hidden = !parts.length;
  };
  const begin = () => $$(".sift").forEach(sift);
  key("/", "filter by prompt", () => { $("#prompt")?.focus(); });
  key("p", "look at the first pair of pictures large; arrows go on, Esc closes", () => { const [first] = cells(); if (first) show(first); });
  on("article", begin);
  begin();
})();
