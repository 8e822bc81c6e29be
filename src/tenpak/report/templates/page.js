// Draws the figures of the page and keeps them in its colours: light, dark, print.
(() => {
  "use strict";
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("data").textContent).figures;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)").matches;
  const PAPER = 660; // pixels between the margins of a page, A4 or letter
  const config = {
    responsive: true,
    displaylogo: false,
    typesetMath: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "toImage"],
  };

  // Values under keys that name colours, "@ink" for the style sheet's --ink; nothing else is touched.
  function coloured(value, key, style) {
    if (Array.isArray(value)) return value.map((item) => coloured(item, key, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, coloured(v, k, style)]));
    }
    const named = typeof value === "string" && value.startsWith("@") && /colou?r/.test(key);
    return named ? style.getPropertyValue("--" + value.slice(1)).trim() : value;
  }

  function layoutOf(own, style, width) {
    const axis = {
      gridcolor: "@grid", linecolor: "@line", zerolinecolor: "@grid", tickcolor: "@line", automargin: true,
      title: { font: { size: 13, color: "@muted" }, standoff: 10 }, tickfont: { size: 12 },
    };
    const layout = {
      font: { family: style.getPropertyValue("--font").trim(), size: 13, color: "@ink" },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 56, r: 12, t: own.legend ? 34 : 10, b: 44 },
      hoverlabel: { bgcolor: "@surface", bordercolor: "@line", font: { color: "@ink" }, align: "left" },
      dragmode: coarse ? false : "zoom",
      ...own,
      xaxis: { ...axis, ...own.xaxis, title: { ...axis.title, ...own.xaxis?.title } },
      yaxis: { ...axis, ...own.yaxis, title: { ...axis.title, ...own.yaxis?.title } },
    };
    if (width) Object.assign(layout, { width, autosize: false });
    else layout.autosize = true;
    return coloured(layout, "", style);
  }

  function draw(figure, width) {
    const style = getComputedStyle(root);
    const place = document.getElementById("plot-" + figure.id);
    const { data, layout } = fitted(figure, width ?? place.clientWidth);
    return Plotly.react(place, coloured(data, "", style), layoutOf(layout, style, width), config);
  }

  // What does not fit is left to the labels that appear on pointing: numbers in the cells of a heat map, and on a phone
  // the names of many points. Names of columns that are wider than these are turned.
  function fitted(figure, width) {
    const map = figure.data[0];
    if (map.type !== "heatmap") {
      const crowded = (trace) => width < 500 && Array.isArray(trace.hovertext) && trace.hovertext.length > 3;
      const data = figure.data.map((trace) => (crowded(trace) ? { ...trace, mode: "markers" } : trace));
      return { ...figure, data };
    }
    const cell = (width - 60) / map.x.length;
    const longest = (texts) => Math.max(...texts.map((text) => text.length));
    const data = cell < 6.4 * longest(map.text.flat()) ? [{ ...map, texttemplate: "" }] : figure.data;
    const turned = { ...figure.layout.xaxis, tickangle: cell < 7 * longest(map.x) ? -40 : 0 };
    return { ...figure, data, layout: { ...figure.layout, xaxis: turned } };
  }

  const pause = () => new Promise((done) => setTimeout(done, 0));

  async function drawAll() {
    root.dataset.drawn = "some";
    for (const figure of figures) {
      await draw(figure);
      await pause(); // a click or a scroll need not wait for the rest
    }
    root.dataset.drawn = "all";
  }

  // Paper is light and narrow, and does not wait.
  function print(begins) {
    root.classList.toggle("printed", begins);
    for (const figure of figures) {
      const width = begins ? PAPER : undefined;
      draw(figure, width);
      if (figure.layout.legend) draw(figure, width); // now that it is known how high the legend is
    }
  }

  dark.addEventListener("change", drawAll);
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  drawAll();
})();
