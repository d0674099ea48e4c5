"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)");
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const plots = [...document.querySelectorAll(".plot")];
  const sources = new Map();

  const hasWebGL = (() => {
    let known;
    return () => (known ??= !!document.createElement("canvas").getContext("webgl"));
  })();

  // Give text, grid and traces the page's colours, light or dark.
  function themed(figure, withRest) {
    const layout = {
      ...figure.layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: {...figure.layout.font, color: colour("--ink"), family: getComputedStyle(document.body).fontFamily},
      hoverlabel: {bgcolor: colour("--card"), bordercolor: colour("--line"), font: {color: colour("--ink")}, namelength: -1},
      modebar: {bgcolor: colour("--paper"), color: colour("--soft"), activecolor: colour("--accent")},
    };
    for (const key of Object.keys(layout).filter(k => /^[xy]axis\d*$/.test(k))) {
      layout[key] = {...layout[key], gridcolor: colour("--grid"), linecolor: colour("--line"), tickcolor: colour("--line")};
      if (coarse.matches) layout[key].fixedrange = true; // a touch scrolls the page; it must not zoom
    }
    if (coarse.matches) layout.dragmode = false;
    const data = figure.data.map(trace => {
      trace = {...trace};
      if (trace.meta?.rest) trace.visible = withRest;
      const own = trace.meta?.[dark.matches ? "dark" : "light"];
      if (own) {
        trace.marker = {...trace.marker, color: own};
        if (trace.type !== "bar") trace.line = {...trace.line, color: own};
        for (const bar of ["error_x", "error_y"]) if (trace[bar]) trace[bar] = {color: own, ...trace[bar]};
      }
      return trace;
    });
    return [data, layout];
  }

  function draw(div) {
    if (!sources.has(div)) sources.set(div, JSON.parse(document.getElementById(div.id + "-data").textContent));
    const figure = sources.get(div);
    if (figure.data.some(trace => trace.type === "parcoords") && !hasWebGL()) {
      div.classList.add("none");
      div.textContent = "This figure needs WebGL, which this browser lacks; the table of all trials shows the same values.";
      return;
    }
    const withRest = !!div.closest("section").querySelector(".rest")?.checked;
    // Listed one by one: plotly's default buttons include one that sends the data to plotly's servers.
    const flat = figure.data[0]?.type !== "parcoords";
    const buttons = [["toImage", ...(flat ? ["zoom2d", "pan2d", "resetScale2d"] : [])]];
    Plotly.react(div, ...themed(figure, withRest), {
      responsive: true, displaylogo: false, displayModeBar: coarse.matches ? false : "hover", modeBarButtons: buttons,
    });
    div.dataset.drawn = dark.matches ? "dark" : "light";
  }

  // Draw figures only when they scroll into view, so that hundreds of trials do not slow down a phone.
  const watcher = new IntersectionObserver(entries => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      watcher.unobserve(entry.target);
      draw(entry.target);
    }
  }, {rootMargin: "300px"});
  plots.forEach(div => watcher.observe(div));
  const redraw = some => some.filter(div => div.dataset.drawn).forEach(draw);
  dark.addEventListener("change", () => redraw(plots));
  addEventListener("beforeprint", () => plots.filter(div => !div.dataset.drawn).forEach(draw));
  for (const box of document.querySelectorAll(".rest")) {
    box.addEventListener("change", () => redraw([...box.closest("section").querySelectorAll(".plot")]));
  }

  async function copy(text) {
    if (navigator.clipboard && isSecureContext) {
      try { await navigator.clipboard.writeText(text); return true; } catch { /* not permitted here: use the older way */ }
    }
    const area = document.createElement("textarea");
    area.value = text;
    area.style.position = "fixed";
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
  document.addEventListener("click", async event => {
    const button = event.target.closest(".copy");
    if (!button) return;
    const done = await copy(button.dataset.copy);
    button.focus();
    button.textContent = done ? "Copied" : "Copy by hand";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
    const shown = document.getElementById("copied");
    if (shown && button.closest("table")) {
      shown.hidden = false;
      shown.replaceChildren(Object.assign(document.createElement("code"), {textContent: button.dataset.copy}));
    }
  });

  const table = document.getElementById("all");
  if (!table) return;
  const body = table.tBodies[0], rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells].filter(head => head.hasAttribute("aria-sort"));
  const compare = (a, b) => {
    const x = Number(a), y = Number(b);
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, {numeric: true}) : x - y;
  };
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.cells[column].dataset.v;
    rows.sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === ""); // rows without a value always come last
      return up ? compare(x, y) : compare(y, x);
    });
    body.append(...rows);
  }));
  const filter = document.getElementById("filter"), status = document.getElementById("status");
  const texts = new Map(rows.map(row => [row, [...row.cells].map(cell => cell.textContent).join(" ").toLowerCase()]));
  function narrow() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      row.hidden = !words.every(word => texts.get(row).includes(word)) ||
        (status.value !== "" && row.dataset.status !== status.value);
      shown += !row.hidden;
    }
    document.getElementById("shown").textContent = `${shown} of ${rows.length} trials`;
  }
  filter.addEventListener("input", narrow);
  status.addEventListener("change", narrow);
})();
