"use strict";
(async () => {
  const packed = Uint8Array.from(atob(document.getElementById("data").textContent), (c) => c.charCodeAt(0));
  const data = JSON.parse(await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text());
  const root = document.documentElement;
  const $ = (selector, from = document) => from.querySelector(selector);
  const $$ = (selector, from = document) => [...from.querySelectorAll(selector)];
  root.classList.add("js");

  // Text from records only ever becomes a text node.
  const el = (name, attributes = {}, ...children) => {
    const node = name.startsWith("svg:")
      ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4))
      : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return node;
  };

  // ---- theme: the system's, until chosen
  const remembered = (value) => {
    try {
      if (value === undefined) return localStorage.getItem("qbench-theme");
      localStorage.setItem("qbench-theme", value);
    } catch { /* a page opened from a file may not keep anything */ }
    return null;
  };
  if (remembered()) root.dataset.theme = remembered();
  $("#theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    remembered(root.dataset.theme);
  });

  // ---- leaderboard: sort and filter; rows far below appear when one gets there, so that sorting is instant
  const STEP = 60;
  const body = $("#leaderboard tbody");
  const rows = [...body.rows];
  const more = $("#more");
  const matching = new Set(rows);
  let limit = STEP;
  const show = () => {
    let n = 0;
    for (const row of body.rows) {
      const hide = !matching.has(row) || ++n > limit;
      if (row.hidden !== hide) row.hidden = hide;
    }
    more.hidden = n <= limit;
    more.textContent = `${n - limit} more rows`;
    $("#count").textContent = n === rows.length ? `${n} rows` : `${n} of ${rows.length} rows`;
  };
  const further = () => { limit += STEP; show(); };
  more.addEventListener("click", further);
  new IntersectionObserver((seen) => { if (seen.some((entry) => entry.isIntersecting)) further(); }, { rootMargin: "800px" }).observe(more);
  addEventListener("beforeprint", () => { limit = Infinity; show(); });
  const keys = [];
  const keysOf = (column) => keys[column] ??= new Map(rows.map((row) => {
    const text = row.cells[column].dataset.v;
    const number = text === "" ? NaN : Number(text);
    return [row, Number.isNaN(number) ? text : number];
  }));
  const headers = $$("#leaderboard th");
  const collator = new Intl.Collator("en");
  let order = { column: -1, sign: 1 };
  const sort = (column, sign) => {
    const key = keysOf(column);
    const sorted = [...body.rows].sort((a, b) => {
      const x = key.get(a), y = key.get(b);
      if (x === "" || y === "") return (x === "") - (y === ""); // what is missing stays last
      return sign * (typeof x === "number" && typeof y === "number" ? x - y : collator.compare(x, y));
    });
    body.append(...sorted);
    limit = STEP;
    show();
    headers.forEach((header) => header.removeAttribute("aria-sort"));
    headers[column].setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    $("#sort").value = column;
    order = { column, sign };
  };
  const firstSign = (column) => $("button", headers[column]).dataset.first === "down" ? -1 : 1;
  headers.forEach((header, column) => $("button", header).addEventListener("click", () =>
    sort(column, order.column === column ? -order.sign : firstSign(column))));
  $("#sort").addEventListener("change", (event) => sort(Number(event.target.value), firstSign(Number(event.target.value))));

  const texts = new Map(rows.map((row) => [row, (row.textContent + " " + (data.rows[row.dataset.id].notes || []).join(" ")).toLowerCase()]));
  const filter = () => {
    const words = $("#find").value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = $$("[data-filter]").filter((select) => select.value);
    matching.clear();
    for (const row of rows) {
      if (words.every((word) => texts.get(row).includes(word))
        && wanted.every((select) => row.dataset[select.dataset.filter] === select.value)
        && (!$("#front").checked || row.classList.contains("front"))) matching.add(row);
    }
    limit = STEP;
    show();
  };
  $("#find").addEventListener("input", filter);
  $("#front").addEventListener("change", filter);
  $$("[data-filter]").forEach((select) => select.addEventListener("change", filter));

  show();

  // ---- plots
  const sets = $$(".plot-set");
  const showSet = (chosen) => sets.forEach((set) => { set.hidden = set.dataset.set !== chosen; });
  if (sets.length > 1) {
    showSet("0");
    $("#plot-set").addEventListener("change", (event) => showSet(event.target.value));
  }

  // ---- downloads
  const download = (name, text, type) => {
    const url = URL.createObjectURL(new Blob([text], { type: type + ";charset=utf-8" }));
    el("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  };
  const kinds = { csv: ["qbench.csv", "text/csv"], latex: ["qbench.tex", "text/x-tex"], bibtex: ["qbench.bib", "text/x-bibtex"] };
  $$("[data-download]").forEach((button) => button.addEventListener("click", () => {
    const [name, type] = kinds[button.dataset.download];
    download(name, data[button.dataset.download], type);
  }));

  // ---- one record
  const dialog = $("#record");
  const shown = (value) => value === null || value === undefined ? "—"
    : typeof value === "object" ? JSON.stringify(value)
    : typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(6))) : String(value);
  const pairs = (object) => el("dl", { class: "pairs" }, Object.entries(object).flatMap(([key, value]) =>
    [el("dt", {}, key), el("dd", {}, shown(value))]));
  const flat = (object, prefix = "") => Object.assign({}, ...Object.entries(object || {}).map(([key, value]) =>
    value !== null && typeof value === "object" && !Array.isArray(value) ? flat(value, prefix + key + ".") : { [prefix + key]: value }));
  const table = (head, lines) => el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": head[0] },
    el("table", {},
      el("thead", {}, el("tr", {}, head.map((title, i) => el("th", i ? {} : { class: "first" }, title)))),
      el("tbody", {}, lines.map((line) => el("tr", {}, line.map((value, i) =>
        el("td", i ? {} : { class: "first" }, value instanceof Node ? value : shown(value))))))));
  const part = (title, ...content) => [el("h3", {}, title), ...content];

  const chart = (title, curves) => {
    const values = curves.flatMap((curve) => curve.values).filter((v) => v !== null && v > 0);
    if (!values.length) return null;
    const [w, h, left, bottom] = [360, 190, 54, 24];
    const low = Math.min(...values), high = Math.max(...values), n = Math.max(...curves.map((c) => c.values.length));
    const x = (i) => left + (n > 1 ? i / (n - 1) : 0.5) * (w - left - 8);
    const y = (v) => h - bottom - (high > low ? Math.log(v / low) / Math.log(high / low) : 0.5) * (h - bottom - 12);
    const lines = curves.map((curve) => el("svg:polyline", {
      class: `curve s${curve.series}${curve.dashed ? " dashed" : ""}`,
      points: curve.values.map((v, i) => v !== null && v > 0 ? `${x(i).toFixed(1)},${y(v).toFixed(1)}` : "").filter(Boolean).join(" "),
    }, el("svg:title", {}, curve.label)));
    const text = (px, py, anchor, content) => el("svg:text", { x: px, y: py, "text-anchor": anchor }, content);
    return el("figure", {}, el("figcaption", {}, title), el("svg:svg", { viewBox: `0 0 ${w} ${h}`, role: "img", "aria-label": title },
      el("svg:path", { class: "axis", d: `M${left} 8V${h - bottom}H${w - 4}` }),
      text(left - 6, 18, "end", high.toPrecision(2)), text(left - 6, h - bottom, "end", low.toPrecision(2)),
      text(left, h - 6, "middle", curves[0].first ?? "0"), text(w - 10, h - 6, "end", String((curves[0].first ?? 0) + n - 1)), ...lines));
  };

  const open = (id) => {
    const row = data.rows[id];
    if (!row) return;
    const contract = data.contracts[row.contract];
    const metrics = Object.entries(row.metrics).map(([key, m]) => [el("span", {}, key, el("small", {}, data.protocols[m.protocol])), m.text, m.ratio ?? "—", m.mark ?? "", `${m.n}${m.n_total && m.n_total !== m.n ? " of " + m.n_total : ""}`]);
    const close = el("button", { type: "button", class: "close", autofocus: "" }, "Close");
    close.addEventListener("click", () => dialog.close());
    const facts = Object.entries(row.facts).map(([key, value]) => el("li", {}, el("b", {}, key), value));
    const b = row.blocks;
    const charts = b ? [
      chart("Block error (log): accumulated, and dashed: of this block alone", [
        { label: "accumulated", series: 0, values: b.accumulated, first: b.first },
        { label: "local", series: 1, dashed: true, values: b.local, first: b.first }].filter((c) => c.values.some((v) => v !== null))),
      b.losses.length ? chart("Training loss by epoch (log), relative to the first", b.losses.map((curve, i) =>
        ({ label: `block ${curve[0]}`, series: i % 8, values: curve[1], first: 1 }))) : null,
    ].filter(Boolean) : [];
    dialog.replaceChildren(
      el("header", {}, el("div", {}, el("h2", { id: "record-title" }, `${row.label} · ${row.scheme}`), el("p", {}, row.model)), close),
      el("ul", { class: "facts" }, facts),
      ...(row.notes.length ? part("Notes", el("ul", { class: "notes" }, row.notes.map((note) => el("li", {}, note)))) : []),
      ...part("Measurements", table(["metric", "value", "÷ full precision", "rank", "items"], metrics)),
      ...(row.seeds.length ? part("Calibration seeds", table(["seed", "record", Object.keys(row.metrics)[0]], row.seeds)) : []),
      ...(charts.length ? part("Blocks", el("div", { class: "charts" }, charts)) : []),
      ...(row.transforms.length ? part("Transforms of a block", table(["site", "kind", "folded", "keeps the function", "stored bits", "FLOP/token"], row.transforms)) : []),
      ...(Object.keys(row.options).length ? part("Options", pairs(row.options)) : []),
      ...part("Contract", pairs({ contract: row.contract, ...flat(contract) })),
      ...(row.calibration !== null ? part("Calibration", pairs(flat(data.calibrations[row.calibration]))) : []),
      ...part("Provenance", pairs({ id: row.id, created: row.created, ...flat(data.environments[row.environment]) })),
      ...part("Configuration", pairs(flat(data.configs[row.config]))));
    dialog.showModal();
    dialog.scrollTop = 0;
    if (location.hash !== "#row-" + id.slice(0, 12)) location.hash = "row-" + id.slice(0, 12);
  };
  dialog.addEventListener("close", () => { if (location.hash.startsWith("#row-")) history.replaceState(null, "", "#board"); });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (row && !getSelection().toString()) open(row.dataset.id);
  });
  document.addEventListener("click", (event) => {
    const mark = event.target.closest("svg [data-row]");
    if (mark) open(mark.dataset.row);
  });
  document.addEventListener("keydown", (event) => {
    const mark = event.target.closest?.("svg [data-row]");
    if (mark && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); open(mark.dataset.row); }
  });
  const fromHash = () => {
    const wanted = location.hash.startsWith("#row-") && Object.keys(data.rows).find((id) => id.startsWith(location.hash.slice(5)));
    if (wanted && !dialog.open) open(wanted);
  };
  addEventListener("hashchange", fromHash);
  fromHash();
  root.dataset.ready = "yes";
})();
