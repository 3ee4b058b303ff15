// Balls and sticks without a library. Each canvas has the atoms of a molecule, "C 0.00 1.20 -0.31;..", in Å. Both of a pair turn
// together, by a drag or by arrow keys; nothing moves by itself.
(() => {
  const RADII = {H: 0.31, C: 0.76, N: 0.71, O: 0.66, F: 0.57}, BOND = 1.25, STEP = 0.12;
  const turned = (angle, [i, j], m) => m.map((row, k) => row.map((value, c) =>
    k === i ? Math.cos(angle) * value - Math.sin(angle) * m[j][c] : k === j ? Math.sin(angle) * m[i][c] + Math.cos(angle) * value : value));

  const distance = (a, b) => Math.hypot(...a.at.map((x, k) => x - b.at[k])), ball = (atom) => 0.16 + 0.4 * atom.radius;

  const parsed = (canvas) => {
    const atoms = canvas.dataset.atoms.split(";").map((row) => row.split(" "))
      .map(([symbol, ...at]) => ({symbol, radius: RADII[symbol], at: at.map(Number)}));
    const bonds = atoms.flatMap((a, i) => atoms.slice(0, i)
      .filter((b) => distance(a, b) < BOND * (a.radius + b.radius)).map((b) => [a, b]));
    return {canvas, atoms, bonds};
  };

  const draw = ({canvas, atoms, bonds}, turn, extent) => {
    const ratio = window.devicePixelRatio || 1, side = canvas.clientWidth, high = canvas.clientHeight, pen = canvas.getContext("2d");
    const paints = Object.fromEntries(["edge", ...Object.keys(RADII)].map((name) => [name, tiltflow.colour(name)])), colour = (name) => paints[name];
    canvas.width = Math.round(side * ratio); canvas.height = Math.round(high * ratio);
    pen.scale(ratio, ratio);
    const place = (at) => {
      const [x, y, z] = turn.map((row) => row.reduce((sum, value, k) => sum + value * at[k], 0));
      const scale = 0.44 * side / extent / (1 - 0.25 * z / extent);
      return {x: side / 2 + scale * x, y: high / 2 - scale * y, z, scale};
    };
    const stroke = (from, to, width, paint) => {
      pen.lineWidth = width; pen.strokeStyle = paint; pen.lineCap = "butt";
      pen.beginPath(); pen.moveTo(from.x, from.y); pen.lineTo(to.x, to.y); pen.stroke();
    };
    const sticks = bonds.flatMap(([a, b]) => [[a, b], [b, a]]).map(([a, b]) => {
      const along = (share) => place(a.at.map((x, k) => x + share * (b.at[k] - x)));
      const from = along(0.9 * ball(a) / distance(a, b)), to = along(0.5);
      return {z: (from.z + to.z) / 2, paint: () => {
        stroke(from, to, 0.3 * from.scale, colour("edge"));
        stroke(from, to, 0.3 * from.scale - 2, colour(a.symbol));
      }};
    });
    const balls = atoms.map((atom) => {
      const {x, y, z, scale} = place(atom.at);
      return {z, paint: () => {
        pen.beginPath(); pen.arc(x, y, ball(atom) * scale, 0, 2 * Math.PI);
        pen.fillStyle = colour(atom.symbol); pen.fill();
        pen.lineWidth = 1; pen.strokeStyle = colour("edge"); pen.stroke();
      }};
    });
    [...sticks, ...balls].sort((a, b) => a.z - b.z).forEach((part) => part.paint());
  };

  const begin = () => {
  for (const pair of document.querySelectorAll(".molecules")) {
    const both = [...pair.querySelectorAll("canvas")].map(parsed);
    if (!both.length) continue;
    const extent = 0.5 + Math.max(...both.flatMap(({atoms}) => atoms.map(({at}) => Math.hypot(...at))));
    let turn = [[1, 0, 0], [0, 1, 0], [0, 0, 1]], last = null;
    const show = () => both.forEach((each) => draw(each, turn, extent));
    const rotate = (across, down) => { turn = turned(down, [1, 2], turned(across, [2, 0], turn)); show(); };
    for (const {canvas} of both) {
      canvas.hidden = false;
      canvas.addEventListener("pointerdown", (event) => { last = event; canvas.setPointerCapture(event.pointerId); });
      canvas.addEventListener("pointerup", () => { last = null; });
      canvas.addEventListener("pointercancel", () => { last = null; });
      canvas.addEventListener("pointermove", (event) => {
        if (last) rotate((event.clientX - last.clientX) / 80, (event.clientY - last.clientY) / 80);
        if (last) last = event;
      });
      canvas.addEventListener("keydown", (event) => {
        const [across, down] = {ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP]}[event.key] || [];
        if (across === undefined) return;
        event.preventDefault();
        rotate(across, down);
      });
      new ResizeObserver(show).observe(canvas);
    }
    tiltflow.on("theme", show);
  }
  document.querySelectorAll(".turns").forEach((note) => { note.hidden = false; });
  };
  tiltflow.on("article", begin);
  begin();
})();
