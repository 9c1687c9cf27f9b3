// What htmx leaves over: dialogs, relative times, plots, and the state of the live stream.
"use strict";
(() => {
  const root = document.documentElement;
  const skew = Number(root.dataset.now || 0) * 1000 - Date.now(); // the hub's clock minus ours

  // Dialogs: <button data-opens="id">, <button data-closes>.
  document.addEventListener("click", (event) => {
    const opener = event.target.closest("[data-opens]");
    if (opener) document.getElementById(opener.dataset.opens)?.showModal();
    const closer = event.target.closest("[data-closes]");
    if (closer) closer.closest("dialog")?.close();
  });

  // "3 min ago" grows while the page is open; the same words as the server's.
  const ago = (seconds) => {
    const past = seconds >= 0;
    const s = Math.abs(seconds);
    const text =
      s < 5 ? "now" : s < 60 ? `${Math.floor(s)} s` : s < 3600 ? `${Math.floor(s / 60)} min`
        : s < 172800 ? `${Math.floor(s / 3600)} h` : `${Math.floor(s / 86400)} days`;
    return text === "now" ? text : past ? `${text} ago` : `in ${text}`;
  };
  const tell = () => {
    for (const time of document.querySelectorAll("time[data-at]")) {
      const text = ago((Date.now() + skew) / 1000 - Number(time.dataset.at));
      if (time.textContent !== text) time.textContent = text;
    }
  };
  setInterval(tell, 5000);

  // Plots: <div class="plot" data-plot='{"x": [...], "x_label": "", "series": [{"label", "y"}]}'>.
  const drawn = new WeakMap();
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const short = (v) => {
    if (v == null) return "–";
    const a = Math.abs(v);
    return a !== 0 && (a < 0.001 || a >= 1e6) ? v.toExponential(1) : String(Number(v.toPrecision(3)));
  };
  // Without a pointer over it the legend tells the last point.
  const rest = (plot) => {
    if (plot.cursor.idx == null) plot.setLegend({ idx: plot.data[0].length - 1 });
  };
  const options = (element, spec) => {
    const axis = { stroke: colour("--quiet"), grid: { stroke: colour("--line"), width: 1 },
      ticks: { stroke: colour("--line"), width: 1 }, font: "12px system-ui, sans-serif" };
    return {
      width: Math.max(element.clientWidth, 120), height: 150,
      scales: { x: { time: false }, y: { range: (_, low, high) => {
        const base = spec.from_zero ? Math.min(0, low) : low;
        const room = (high - base || 1) * 0.08;
        return [spec.from_zero ? base : base - room, high + room];
      } } },
      cursor: { y: false, drag: { x: false, y: false } },
      legend: { live: true },
      hooks: { setCursor: [rest], ready: [rest] },
      axes: [
        { ...axis, size: 28, values: (_, ticks) => ticks.map((t) => (Number.isInteger(t) ? t : "")) },
        { ...axis, size: 52, values: (_, ticks) => ticks.map(short), ...(spec.whole ? { incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000] } : {}) },
      ],
      series: [
        { label: spec.x_label, value: (_, v) => short(v) },
        ...spec.series.map((line, i) => ({
          label: line.label, stroke: colour(`--series-${i + 1}`), width: 2,
          dash: i ? [6, 4] : undefined, points: { show: spec.x.length < 40, size: 6 },
          value: (_, v) => short(v),
        })),
      ],
    };
  };
  const draw = (element, again) => {
    const text = element.dataset.plot;
    const before = drawn.get(element);
    if (before && before.text === text && !again) return;
    before?.plot.destroy();
    const spec = JSON.parse(text);
    const plot = new uPlot(options(element, spec), [spec.x, ...spec.series.map((s) => s.y)], element);
    drawn.set(element, { plot, text });
  };
  const drawAll = (again) => {
    for (const element of document.querySelectorAll(".plot[data-plot]")) draw(element, again);
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll(true));
  let resized;
  addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(() => drawAll(true), 150); });

  // The live stream: htmx holds the connection, this says how it is.
  const stream = (state, words) => {
    root.dataset.stream = state;
    for (const element of document.querySelectorAll(".live")) element.textContent = words;
  };
  const shown = () => stream(root.dataset.stream || "off", { live: "live", lost: "reconnecting" }[root.dataset.stream] || "connecting");
  document.addEventListener("htmx:sse:after:connection", () => stream("live", "live"));
  document.addEventListener("htmx:sse:close", () => stream("lost", "reconnecting"));
  document.addEventListener("htmx:sse:error", (event) => {
    if (event.detail?.status === 401) location.assign("/login");
    else stream("lost", "reconnecting");
  });
  document.addEventListener("htmx:after:swap", () => { drawAll(false); tell(); shown(); });
  addEventListener("DOMContentLoaded", () => { drawAll(false); tell(); });
})();
