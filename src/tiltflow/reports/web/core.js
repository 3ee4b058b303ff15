// What all scripts of the page share: its data, requests, keys, sections, colours and the theme.
//
// A script of a further part (src/tiltflow/view/parts/) adds to the page by
//   tiltflow.section({id, title, note, mount(place)})  a section of its own; `mount` fills the element, once
//   tiltflow.key("b", "what it does", () => ..)        a key of the keyboard, listed by ?
//   tiltflow.get("rate/pairs", {at: run.key}), tiltflow.post("rate/vote", {..})   its routes in /api/: promises of JSON
//   tiltflow.shown()                                   the run that is shown: {key, name, state, ..}; null where there is none
//   tiltflow.on("run", (run) => ..)                    is called when another run is shown, or it has changed
"use strict";
const tiltflow = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const keys = [], listeners = {};
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

  // ---- elements: element("p", {class: "note"}, "text", child) ----
  const element = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value !== false && value !== null) made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children);
    return made;
  };

  // ---- events ----
  const on = (event, act) => (listeners[event] ||= []).push(act);
  const emit = (event, ...what) => (listeners[event] || []).forEach((act) => act(...what));

  // ---- requests ----
  const answered = async (response) => {
    const tree = await response.json();
    if (!response.ok) throw new Error(tree.error);
    return tree;
  };
  const get = (route, query = {}) => fetch(`/api/${route}?${new URLSearchParams(query)}`).then(answered);
  const post = (route, body) => fetch(`/api/${route}`, {
    method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body),
  }).then(answered);

  // ---- keys ----
  const key = (letter, what, act) => keys.push({letter, what, act});
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest?.("input:not([type=range]):not([type=checkbox]), textarea, select");
    if (event.ctrlKey || event.metaKey || event.altKey || typing || event.defaultPrevented) return;
    const found = keys.find(({letter}) => letter === event.key);
    if (found && found.act(event) !== false) event.preventDefault();
  });
  const help = $("#help");
  const showHelp = () => {
    const list = $("dl", help);
    list.replaceChildren(...keys.flatMap(({letter, what}) => [
      element("dt", {}, element("kbd", {}, letter === " " ? "space" : letter)), element("dd", {}, what)]));
    help.open ? help.close() : help.showModal();
  };
  key("?", "this list of keys", showHelp);
  $("#show-help").addEventListener("click", showHelp);

  // ---- colours and theme: the reader's, or the one that was chosen on this page ----
  const store = {
    read: (name) => { try { return localStorage.getItem(`tiltflow-${name}`); } catch { return null; } },
    write: (name, value) => { try { localStorage.setItem(`tiltflow-${name}`, value); } catch { /* a page of a file may have none */ } },
  };
  const probe = element("span", {hidden: true});
  document.body.append(probe);
  const colour = (name) => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; };
  const dark = () => getComputedStyle(document.documentElement).colorScheme === "dark"
    || (getComputedStyle(document.documentElement).colorScheme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
  const theme = (name) => {
    document.documentElement.style.colorScheme = name;
    emit("theme");
  };
  const toggle = () => {
    const name = dark() ? "light" : "dark";
    store.write("theme", name);
    theme(name);
  };
  if (["light", "dark"].includes(store.read("theme"))) theme(store.read("theme"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => emit("theme"));
  key("d", "dark or light", toggle);
  $("#theme").addEventListener("click", toggle);
  $(".bar").classList.add("works");

  // ---- sections ----
  const section = ({id, title, note = "", mount}) => {
    const place = element("div");
    const made = element("section", {id}, element("h2", {}, title), element("p", {class: "note"}, note), place);
    $("#parts").append(made);
    mount(place);
    return made;
  };

  const shown = () => data.runs.find((run) => run.key === data.shown) || null;  // on a page of several runs there is none
  return {data, $, $$, element, on, emit, get, post, key, store, colour, section, shown};
})();
