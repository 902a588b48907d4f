"use strict";
// Draws the figures of the page, in its colours, and again when the colours change.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 560px)");

  const themed = (layout) => {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const axis = { gridcolor: color("--grid"), linecolor: color("--line"), zerolinecolor: color("--line"), automargin: true, fixedrange: narrow.matches };
    const result = {
      ...layout,
      autosize: true,
      height: narrow.matches ? Math.min(layout.height, 520) : layout.height,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("--ink") },
      margin: { l: 52, r: 10, t: 10, b: 44, ...layout.margin },
      legend: { ...(narrow.matches ? { orientation: "h", y: -0.02, yanchor: "top", x: 0 } : { x: 1.01, y: 1 }), ...layout.legend },
      hoverlabel: { align: "left", bgcolor: color("--card"), bordercolor: color("--soft"), font: { color: color("--ink"), size: narrow.matches ? 11 : 13 }, namelength: -1 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: color("--soft"), activecolor: color("--ink"), orientation: "h" },
      dragmode: narrow.matches ? false : "zoom",
    };
    for (const name of ["xaxis", "yaxis", "yaxis2"]) {
      if (layout[name]) result[name] = { ...axis, ...layout[name] };
    }
    return result;
  };
  // Buttons only for the map, and only such as need no network.
  const config = (id) => ({
    responsive: true,
    displaylogo: false,
    displayModeBar: id === "map" && !narrow.matches,
    modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]],
  });
  const draw = () =>
    Promise.all(
      Object.entries(figures).map(([id, figure]) =>
        Plotly.react(id, figure.data, themed(figure.layout), config(id))
      )
    );
  draw().then(() => document.documentElement.setAttribute("data-drawn", "yes"));
  dark.addEventListener("change", draw);
  narrow.addEventListener("change", draw);
  window.addEventListener("beforeprint", () => Object.keys(figures).forEach((id) => Plotly.Plots.resize(id)));
})();
