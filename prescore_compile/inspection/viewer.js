"use strict";
// The viewer of an inspection. Whatever comes from the model becomes text nodes, never markup.
// Only the rows that can be seen are in the document, so that 10,000 nodes scroll as 100 do.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const CHANGES = ["", "added", "removed", "rewired", "moved"];
  const SIGNS = {"": "", added: "+", removed: "−", rewired: "~", moved: "↕"};
  const HEIGHT = 20, CONTEXT = 2, SPARE = 12;
  const $ = (id) => document.getElementById(id);
  const S = data.strings;

  function el(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key === "class") node.className = value;
      else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
    return node;
  }

  // Nodes of a graph, read from its columns.
  class Graph {
    constructor(columns) {
      Object.assign(this, columns);
      this.length = columns.name.length;
    }
    text(column, at) { return S[this[column][at]]; }
    // [[text, place or null]]: the node as a line of Python whose names are places in the graph.
    parts(at) {
      const form = this.text("form", at).split("\0");
      const output = form.length === this.inputs[at].length + 1;
      const places = output ? this.inputs[at] : [at, ...this.inputs[at]];
      const found = [];
      form.forEach((piece, i) => {
        if (piece) found.push([piece, null]);
        if (i < places.length) found.push([this.text("name", places[i]), places[i]]);
      });
      return found;
    }
    line(at) { return this.parts(at).map((part) => part[0]).join(""); }
    get users() {
      if (!this._users) {
        this._users = Array.from({length: this.length}, () => []);
        this.inputs.forEach((inputs, at) => new Set(inputs).forEach((source) => this._users[source].push(at)));
      }
      return this._users;
    }
  }
  const graphs = data.graphs.map((columns) => new Graph(columns));

  // One diff: its rows, and which of them are shown.
  class View {
    constructor(raw) {
      Object.assign(this, raw);
      this.before = graphs[raw.before];
      this.after = graphs[raw.after];
      this.count = raw.rows.length / 3;
      this.sites = new Map();
      data.logs[raw.graph].sites.forEach((site) => this.sites.set(site.node, site));
      this.siteRows = new Map();
      this.opened = new Set();
      this.changes = [];
      for (let r = 0; r < this.count; r++) {
        if (this.change(r) && (r === 0 || !this.change(r - 1))) this.changes.push(r);
        const site = this.site(r);
        if (site) this.siteRows.set(site.node, r);
      }
      this.folds = this.changes.length || this.siteRows.size ? this.findFolds() : [];
      this.lay();
    }
    left(r) { return this.rows[3 * r]; }
    right(r) { return this.rows[3 * r + 1]; }
    change(r) { return CHANGES[this.rows[3 * r + 2]]; }
    node(r) { return this.right(r) >= 0 ? [this.after, this.right(r)] : [this.before, this.left(r)]; }
    partner(at) {  // the place after of a place before; undefined for a moved one
      if (!this._partners) {
        this._partners = new Map();
        for (let r = 0; r < this.count; r++) if (this.left(r) >= 0 && this.right(r) >= 0) this._partners.set(this.left(r), this.right(r));
      }
      return this._partners.get(at);
    }
    site(r) { return this.left(r) >= 0 ? this.sites.get(this.before.text("name", this.left(r))) : undefined; }
    madeFor(r) {  // the site that an added node was made for
      return this.change(r) === "added" ? this.sites.get(this.after.text("origin", this.right(r)).split(" (by ")[0]) : undefined;
    }
    // Runs of rows far from any change or site, as [first, last + 1].
    findFolds() {
      const near = new Uint8Array(this.count);
      for (let r = 0; r < this.count; r++) {
        if (!this.change(r) && !this.site(r)) continue;
        near.fill(1, Math.max(0, r - CONTEXT), Math.min(this.count, r + CONTEXT + 1));
      }
      const found = [];
      for (let r = 0; r < this.count;) {
        let end = r;
        while (end < this.count && !near[end]) end++;
        if (end - r > 3) found.push([r, end]);
        r = Math.max(end, r) + 1;
      }
      return found;
    }
    // The lines that are shown: rows, folds, and where the code above a row comes from.
    lay() {
      this.items = [];
      this.places = new Int32Array(this.count).fill(-1);
      let last = -1, fold = 0;
      for (let r = 0; r < this.count; r++) {
        while (fold < this.folds.length && this.folds[fold][1] <= r) fold++;
        const here = this.folds[fold];
        if (here && here[0] <= r && !this.opened.has(here[0])) {
          this.items.push({kind: "fold", row: r, end: here[1]});
          this.places.fill(this.items.length - 1, r, here[1]);
          r = here[1] - 1;
          last = -1;
          continue;
        }
        const [graph, at] = this.node(r);
        const from = graph.source[at] ? [graph.source[at], graph.module[at], graph.code[at]].join() : -1;
        if (from !== last && from !== -1) this.items.push({kind: "from", row: r});
        last = from;
        this.places[r] = this.items.length;
        this.items.push({kind: "row", row: r});
      }
    }
    open(r) {
      const fold = this.folds.find(([first, end]) => first <= r && r < end);
      if (fold && !this.opened.has(fold[0])) { this.opened.add(fold[0]); this.lay(); return true; }
      return false;
    }
    get unfolded() { return this.folds.every(([first]) => this.opened.has(first)); }
    foldAll(open) {
      this.opened = new Set(open ? this.folds.map(([first]) => first) : []);
      this.lay();
    }
    haystack(r) {
      if (!this._haystacks) this._haystacks = new Array(this.count);
      if (this._haystacks[r] === undefined) {
        const words = (graph, at) => at < 0 ? "" : [graph.line(at), graph.text("module", at), graph.text("source", at),
          graph.text("code", at), graph.text("origin", at)].join(" ");
        const left = words(this.before, this.left(r)), right = words(this.after, this.right(r));
        this._haystacks[r] = (left === right ? left : left + " " + right).toLowerCase();
      }
      return this._haystacks[r];
    }
  }

  const views = new Array(data.views.length);
  const viewOf = (at) => views[at] || (views[at] = new View(data.views[at]));
  let view = null, selected = -1, hits = [], hit = -1, query = "";
  const rowOf = (graph, at) => {  // the row of a node, for links
    for (let r = 0; r < view.count; r++) if ((graph === view.after ? view.right(r) : view.left(r)) === at) return r;
    return -1;
  };

  const PYTHON = /("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(\b(?:None|True|False|return|self|Ellipsis|inf)\b)|(-?\b\d[\w.]*(?:e[+-]?\d+)?\b)|([A-Za-z_][\w.]*(?=\())/g;

  function coloured(text, pattern, classes) {
    const found = [];
    let end = 0;
    for (const match of text.matchAll(pattern)) {
      if (match.index > end) found.push(text.slice(end, match.index));
      const kind = classes[match.slice(1).findIndex((group) => group !== undefined)];
      found.push(el("span", {class: kind}, match[0]));
      end = match.index + match[0].length;
    }
    if (end < text.length) found.push(text.slice(end));
    return found;
  }
  const python = (text) => coloured(text, PYTHON, ["str", "word", "num", "calls"]);

  const short = (source) => source.split("/").slice(-2).join("/");

  // A mask such as "k <= q and not valid[b, k]" as mathematics.
  function maths(text) {
    const signs = {"<=": "≤", ">=": "≥", "!=": "≠", "==": "=", and: "∧", or: "∨", not: "¬", "*": "·", "//": "÷", "-": "−"};
    const found = el("span", {class: "math"});
    for (const [token] of text.matchAll(/<=|>=|!=|==|\/\/|\b(?:and|or|not)\b|[A-Za-z_]\w*|[*-]|\s+|./gsu)) {
      if (signs[token]) found.append(/^\w/.test(token) ? el("span", {class: "op"}, signs[token]) : signs[token]);
      else if (/^[a-z]$/.test(token)) found.append(el("i", {}, token));
      else found.append(token);
    }
    return found;
  }

  // The rows.
  const scroller = $("scroller"), canvas = $("canvas");
  // Which inputs of a rewired node are other nodes than before.
  function differing(r) {
    if (view.change(r) !== "rewired") return null;
    const before = view.before.inputs[view.left(r)], after = view.after.inputs[view.right(r)];
    const found = [new Set(), new Set()];
    for (let i = 0; i < Math.max(before.length, after.length); i++) {
      if (before[i] !== undefined && view.partner(before[i]) === after[i]) continue;
      found[0].add(before[i]);
      found[1].add(after[i]);
    }
    return found;
  }
  function cell(graph, at, side, change, other) {
    if (at < 0) return el("div", {class: `cell ${side} none`});
    const text = el("span", {class: "text"});
    for (const [piece, place] of graph.parts(at)) {
      if (place === null) text.append(...python(piece));
      else text.append(el("span", {class: place === at ? "own" : other && other.has(place) ? "ref other" : "ref"}, piece));
    }
    const mine = (side === "before" && change === "added") || (side === "after" && change === "removed");
    return el("div", {class: `cell ${side}`}, el("span", {class: "at"}, String(at)),
      el("span", {class: "sign"}, mine ? "" : SIGNS[change]), text, el("span", {class: "value"}, graph.text("value", at)));
  }
  function drawn(item, place) {
    const style = `top:${place * HEIGHT}px`;
    if (item.kind === "fold") {
      const names = new Set();
      for (let r = item.row; r < item.end && names.size < 4; r++) {
        const [graph, at] = view.node(r);
        if (graph.module[at]) names.add(graph.text("module", at));
      }
      const node = el("div", {class: "fold" + (selected === item.row ? " selected" : ""), style, role: "button"},
        `⋯ ${item.end - item.row} unchanged nodes`, el("span", {class: "modules"}, [...names].join("  ")));
      node.dataset.fold = item.row;
      return node;
    }
    const [graph, at] = view.node(item.row);
    if (item.kind === "from") {
      const source = graph.text("source", at);
      return el("div", {class: "from", style}, el("span", {class: "place"}, short(source)),
        el("span", {class: "module"}, graph.text("module", at)), el("span", {class: "code"}, graph.text("code", at)));
    }
    const change = view.change(item.row), site = view.site(item.row);
    const classes = ["row", change, item.row === selected ? "selected" : "", site && site.decision === "keep" ? "kept" : ""];
    if (query && view.haystack(item.row).includes(query)) classes.push("hit");
    const other = differing(item.row);
    const node = el("div", {class: classes.filter(Boolean).join(" "), style},
      cell(view.before, view.left(item.row), "before", change, other && other[0]),
      cell(view.after, view.right(item.row), "after", change, other && other[1]));
    if (site) {
      const text = site.decision === "keep" ? `kept: ${site.reason.split(":")[0]}` : "rewritten";
      node.firstChild.insertBefore(el("span", {class: `badge ${site.decision}`}, text), node.firstChild.lastChild);
    }
    node.dataset.row = item.row;
    return node;
  }
  function draw() {
    if (!view) return;
    const first = Math.max(0, Math.floor(scroller.scrollTop / HEIGHT) - SPARE);
    const last = Math.min(view.items.length, Math.ceil((scroller.scrollTop + scroller.clientHeight) / HEIGHT) + SPARE);
    canvas.style.height = `${view.items.length * HEIGHT}px`;
    const fresh = document.createDocumentFragment();
    for (let place = first; place < last; place++) fresh.append(drawn(view.items[place], place));
    canvas.replaceChildren(fresh);
    markMap();
  }
  let waiting = false;
  const soon = () => { if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; draw(); }); } };

  // The strip at the right: where the changes, sites and hits are.
  const map = $("map");
  let mapBase = null;
  function drawMap() {
    const height = map.height = Math.max(1, Math.round(map.clientHeight * devicePixelRatio)), pen = map.getContext("2d", {willReadFrequently: true});
    const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    const colours = {added: colour("--add-edge"), removed: colour("--del-edge"), rewired: colour("--wire-edge"), moved: colour("--move-edge")};
    const tall = Math.max(1, view.items.length), size = Math.max(1, height / tall);
    pen.clearRect(0, 0, map.width, height);
    view.items.forEach((item, place) => {
      if (item.kind !== "row") return;
      const change = view.change(item.row), kept = view.site(item.row);
      if (change || kept) {
        pen.fillStyle = change ? colours[change] : colour("--accent");
        pen.fillRect(change === "added" ? 7 : 0, place / tall * height, change === "rewired" || !change ? 14 : 7, size);
      }
    });
    if (hits.length) {
      pen.fillStyle = colour("--accent");
      hits.forEach((r) => pen.fillRect(4, view.places[r] / tall * height, 6, Math.max(1.5, size)));
    }
    mapBase = pen.getImageData(0, 0, map.width, height);
  }
  function markMap() {
    if (!mapBase) return;
    const pen = map.getContext("2d"), all = Math.max(1, view.items.length * HEIGHT);
    pen.putImageData(mapBase, 0, 0);
    pen.fillStyle = "#8888885c";
    pen.fillRect(0, scroller.scrollTop / all * map.height, map.width, Math.max(4, scroller.clientHeight / all * map.height));
  }
  map.addEventListener("pointerdown", (event) => {
    const go = (e) => { scroller.scrollTop = (e.offsetY / map.clientHeight) * view.items.length * HEIGHT - scroller.clientHeight / 2; };
    map.setPointerCapture(event.pointerId);
    map.onpointermove = go;
    map.onpointerup = () => { map.onpointermove = null; };
    go(event);
  });

  function show(r, middle) {
    if (view.open(r)) drawMap();
    const top = view.places[r] * HEIGHT, height = scroller.clientHeight;
    if (middle || top < scroller.scrollTop + HEIGHT || top > scroller.scrollTop + height - 2 * HEIGHT)
      scroller.scrollTop = Math.max(0, top - (middle ? height / 3 : top < scroller.scrollTop + HEIGHT ? 2 * HEIGHT : height - 3 * HEIGHT));
  }
  function select(r, middle) {
    selected = r;
    detail(r);  // before scrolling: it takes room
    show(r, middle);
    draw();
  }

  // What is known about a row.
  function facts(pairs) {
    return el("dl", {class: "facts"}, pairs.filter((pair) => pair[1] !== "" && pair[1] !== null).flatMap(([name, value, words]) =>
      [el("dt", {}, name), el("dd", {class: words ? "words" : ""}, value)]));
  }
  function links(graph, places) {
    const shown = places.slice(0, 24).map((at) => el("button", {class: "link", onclick: () => select(rowOf(graph, at), true)}, graph.text("name", at)));
    return places.length ? [...shown, places.length > 24 ? `and ${places.length - 24} more` : ""] : "";
  }
  function side(graph, at, name) {
    if (at < 0) return el("div", {}, el("h3", {}, `${name}: nothing`));
    return el("div", {}, el("h3", {}, `${name}: node ${at}`), el("pre", {}, python(graph.line(at))),
      facts([["value", graph.text("value", at)], ["module", graph.text("module", at)], ["source", graph.text("source", at)],
        ["code", graph.text("code", at)], ["made from", graph.text("origin", at)], ["reads", links(graph, [...new Set(graph.inputs[at])])],
        ["read by", links(graph, graph.users[at])]]));
  }
  const percent = (share) => share === null ? "" : `${(100 * share).toFixed(1)}%`;
  const times = (gain) => gain === null ? "" : `${gain.toFixed(1)}x as fast`;
  const costs = (cost) => cost === null ? "" : cost >= 1e12 ? `${(cost / 1e12).toPrecision(3)} TMAC` : cost >= 1e9 ? `${(cost / 1e9).toPrecision(3)} GMAC` : `${(cost / 1e6).toPrecision(3)} MMAC`;
  const meaning = (site) => data.reasons[site.reason.split(":")[0]] || "";
  function siteCard(site) {
    return el("div", {class: "site"}, facts([
      ["decision", site.decision === "keep" ? `kept exact: ${site.reason}` : site.exact ? "rewritten, and exact" : site.recognized ? `rewritten, by what its mask turns out to be: ${site.recognized}` : `rewritten with ${site.plan}`],
      ["meaning", site.decision === "keep" ? meaning(site) : site.exact ? data.exact[site.exact] : site.recognized ? `where it is neither, ${data.exact.mask}` : "", true],
      ["failed at", site.decision === "keep" ? site.failed : ""],
      ["rule", `${site.rule}: ${data.rules[site.rule] || ""}`, true],
      ["mask", maths(site.mask)],
      ["shape", Object.entries(site.shape).map(([key, value]) => `${key} ${value}`).join(", ")],
      ["cost", [[site.exact_cost, "exact"], [site.prescored_cost, "prescored"]].filter(([cost]) => cost !== null).map(([cost, name]) => `${costs(cost)} ${name}`).join(" → ")],
      ["density", percent(site.density)],
      ["expected", times(site.gain)],
    ]));
  }
  function detail(r) {
    const site = r < 0 ? null : view.site(r) || view.madeFor(r);
    $("detail").replaceChildren(...(r < 0 ? [] : [site ? siteCard(site) : "", el("div", {class: "pair"},
      side(view.before, view.left(r), "before"), side(view.after, view.right(r), "after"))].filter(Boolean)));
    $("detail").scrollTop = 0;
  }

  // Pointing at a row says where it comes from.
  const tip = $("tip");
  scroller.addEventListener("mousemove", (event) => {
    const node = event.target.closest(".row");
    if (!node) { tip.hidden = true; return; }
    const r = Number(node.dataset.row), [graph, at] = view.node(r), site = view.site(r);
    if (tip.dataset.row !== String(r)) {
      tip.dataset.row = r;
      tip.replaceChildren(el("div", {class: "code"}, graph.text("code", at) || graph.line(at)),
        el("div", {class: "quiet"}, [graph.text("module", at), graph.text("source", at)].filter(Boolean).join(" · ") || "no source recorded"),
        graph.text("origin", at) ? el("div", {class: "quiet"}, `from ${graph.text("origin", at)}`) : "",
        site ? el("div", {}, "mask ", maths(site.mask)) : "",
        site ? el("div", {class: "quiet"}, site.decision === "keep" ? `kept exact: ${site.reason}` : site.density === null ? "rewritten" : `rewritten, density ${percent(site.density)}`) : "");
    }
    tip.hidden = false;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${event.clientY + 18 + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 10 : event.clientY + 18}px`;
  });
  scroller.addEventListener("mouseleave", () => { tip.hidden = true; });
  scroller.addEventListener("scroll", () => { tip.hidden = true; soon(); });
  scroller.addEventListener("click", (event) => {
    const node = event.target.closest("[data-fold], [data-row]");
    if (!node) return;
    if (node.dataset.fold !== undefined) { view.open(Number(node.dataset.fold)); drawMap(); foldLabel(); draw(); }
    else select(Number(node.dataset.row));
  });

  // Graph and step.
  function choose(at) {
    view = viewOf(at);
    $("view").value = String(at);
    $("summary").textContent = view.summary;
    const title = data.logs[view.graph].title;
    $("graph").textContent = title;
    $("graph").hidden = data.logs.length < 2 && !title.includes("; ");
    $("left").textContent = `${view.name.split(" → ")[0]}, ${view.before.length} nodes`;
    $("right").textContent = `${view.name.split(" → ")[1]}, ${view.after.length} nodes`;
    selected = -1;
    detail(-1);
    find(query);
    foldLabel();
    scroller.scrollTop = 0;
    drawMap();
    draw();
  }
  const foldLabel = () => { $("fold").textContent = view.unfolded ? "Fold unchanged" : "Unfold all"; $("fold").hidden = !view.folds.length; };
  function jump(step) {
    const here = selected >= 0 ? selected : view.items[Math.floor(scroller.scrollTop / HEIGHT)]?.row ?? -1;
    const next = step > 0 ? view.changes.find((r) => r > here) : [...view.changes].reverse().find((r) => r < here);
    if (next !== undefined) select(next, true);
  }
  function move(step) {
    let place = selected < 0 ? Math.floor(scroller.scrollTop / HEIGHT) - 1 : view.places[selected];
    do place += step; while (view.items[place] && view.items[place].kind === "from");
    const item = view.items[place];
    if (!item) return;
    if (item.kind === "row") { select(item.row); return; }
    selected = item.row;
    detail(-1);
    scroller.scrollTop = Math.min(scroller.scrollTop, place * HEIGHT);
    if ((place + 2) * HEIGHT > scroller.scrollTop + scroller.clientHeight) scroller.scrollTop = (place + 2) * HEIGHT - scroller.clientHeight;
    draw();
  }

  // Search.
  function find(text) {
    query = text.trim().toLowerCase();
    hits = [];
    hit = -1;
    if (query) for (let r = 0; r < view.count; r++) if (view.haystack(r).includes(query)) hits.push(r);
    $("hits").textContent = query ? `${hits.length} found` : "";
  }
  function nextHit(step) {
    if (!hits.length) return;
    hit = (hit + step + hits.length) % hits.length;
    $("hits").textContent = `${hit + 1} of ${hits.length}`;
    select(hits[hit], true);
    drawMap();
    draw();
  }
  let typing = 0;
  $("search").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => {
      if (view) { find($("search").value); drawMap(); draw(); }
      table();
    }, 120);
  });

  // Decisions.
  const sites = data.logs.flatMap((log, graph) => log.sites.map((site) => ({...site, graph, code_of_reason: site.decision === "keep" ? site.reason.split(":")[0] : "rewritten"})));
  const COLUMNS = [
    ["module", (s) => s.module || "—", "mono"], ["source", (s) => s.source, "mono"], ["decision", (s) => s.decision, ""],
    ["reason", (s) => s.reason, ""], ["rule", (s) => s.rule, ""], ["mask", (s) => s.mask, ""],
    ["heads", (s) => `${s.shape.heads ?? "?"}/${s.shape.kv_heads ?? "?"}`, "right"], ["keys", (s) => s.shape.k_len ?? "?", "right"],
    ["device", (s) => s.device || "—", ""],
    ["exact", (s) => s.exact_cost, "right"], ["prescored", (s) => s.prescored_cost, "right"], ["density", (s) => s.density, "right"],
    ["expected", (s) => s.gain, "right"],
  ];
  let sorted = null, falling = false;
  const chosen = new Set();
  const compare = (a, b) => a === b ? 0 : a === null ? 1 : b === null ? -1 : typeof a === "number" ? a - b : String(a).localeCompare(String(b), undefined, {numeric: true});
  function chips() {
    const counts = new Map();
    sites.forEach((site) => counts.set(site.code_of_reason, (counts.get(site.code_of_reason) || 0) + 1));
    const chip = (label, count, pressed, toggle, title) => el("button", {class: "chip", "aria-pressed": String(pressed), title: title || "", onclick: () => { toggle(); chips(); table(); }}, label + " ", el("b", {}, String(count)));
    $("chips").replaceChildren(chip("all", sites.length, !chosen.size, () => chosen.clear()),
      ...[...counts].sort((a, b) => b[1] - a[1]).map(([code, count]) => chip(code, count, chosen.has(code),
        () => { if (!chosen.delete(code)) chosen.add(code); }, data.reasons[code])));
  }
  function head() {
    $("head").replaceChildren(el("tr", {}, COLUMNS.map(([name, , kind], at) => el("th", {class: kind === "right" ? "right" : "", "aria-sort": sorted === at ? (falling ? "descending" : "ascending") : null},
      el("button", {onclick: () => { falling = sorted === at && !falling; sorted = at; head(); table(); }}, name + (sorted === at ? (falling ? " ↓" : " ↑") : ""))))));
  }
  function shownCell(site, [name, value, kind]) {
    const text = value(site);
    if (name === "module") return el("td", {class: text.length < 40 ? `${kind} whole` : kind}, el("div", {class: "clip", title: text}, text));
    if (name === "source") return el("td", {class: kind, title: text}, short(text), el("span", {class: "quiet"}, site.code));
    if (name === "decision") return el("td", {}, el("span", {class: `badge ${site.decision}`, style: "margin:0"}, site.decision), site.exact ? el("span", {class: "quiet", title: data.exact[site.exact]}, "exact") : site.recognized ? el("span", {class: "quiet", title: site.recognized}, "by its mask") : "");
    if (name === "reason") return el("td", {title: meaning(site)}, text || "—", site.failed ? el("span", {class: "quiet"}, `at ${short(site.failed)}`) : "");
    if (name === "rule") return el("td", {class: "whole", title: data.rules[text] || ""}, text);
    if (name === "mask") return el("td", {class: text.length < 40 ? "whole" : ""}, maths(text));
    if (name === "density") return el("td", {class: kind}, text === null ? "—" : [el("span", {class: "gauge"}, el("i", {style: `width:${Math.min(100, 100 * text).toFixed(1)}%`})), percent(text)]);
    if (name === "exact" || name === "prescored") return el("td", {class: kind}, costs(text) || "—");
    if (name === "expected") return el("td", {class: kind, title: "faster by the cost model, all stages counted in"}, text === null ? "—" : `${text.toFixed(1)}x`);
    return el("td", {class: kind}, String(text));
  }
  const MOST = 1000;
  function table() {
    const words = $("search").value.trim().toLowerCase();
    let rows = sites.filter((site) => (!chosen.size || chosen.has(site.code_of_reason)) &&
      (!words || [site.module, site.source, site.code, site.reason, site.rule, site.mask, site.kind].join(" ").toLowerCase().includes(words)));
    if (sorted !== null) rows = [...rows].sort((a, b) => compare(COLUMNS[sorted][1](a), COLUMNS[sorted][1](b)) * (falling ? -1 : 1));
    const go = (site) => {
      const at = data.views.findIndex((raw) => raw.graph === site.graph);
      if (at < 0) return;
      tab("diff");
      choose(at);
      const row = view.siteRows.get(site.node);
      if (row !== undefined) select(row, true);
    };
    $("body").replaceChildren(...rows.slice(0, MOST).map((site) => el("tr", {tabindex: "0", onclick: () => go(site), onkeydown: (e) => { if (e.key === "Enter") go(site); }},
      COLUMNS.map((column) => shownCell(site, column)))),
      ...(rows.length > MOST ? [el("tr", {}, el("td", {colspan: COLUMNS.length, class: "empty"}, `and ${rows.length - MOST} more: narrow the search`))] : []),
      ...(rows.length ? [] : [el("tr", {}, el("td", {colspan: COLUMNS.length, class: "empty"}, sites.length ? "No site is like that." : "No attention was found, or none was asked for."))]));
  }

  // Kernels.
  const CPP = /(\/\/.*|\/\*.*?\*\/)|("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)')|(^\s*#\w+)|(\b(?:alignas|auto|bool|break|case|char|class|const|constexpr|continue|double|else|enum|extern|false|float|for|if|inline|int|namespace|nullptr|operator|private|public|return|short|signed|sizeof|static|struct|switch|template|this|true|typedef|typename|unsigned|using|void|while|u?int\d+_t|size_t|vec|ivec)\b)|(\b\d[\w.']*\b)|(\b[A-Za-z_]\w*(?=\())/g;
  const TRITON = /(#.*)|("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(^\s*@[\w.]+)|(\b(?:and|as|assert|break|class|continue|def|elif|else|False|for|from|if|import|in|is|lambda|None|not|or|pass|return|True|while|with)\b)|(\b\d[\w.]*\b)|(\b[A-Za-z_]\w*(?=\())/g;
  const KINDS = ["note", "str", "word", "word", "num", "calls"];
  function drawKernels() {
    if ($("kernels").firstChild) return;
    $("kernels").append(...data.kernels.map((kernel) => el("article", {class: "kernel"}, el("h2", {}, kernel.name),
      el("ul", {class: "users"}, kernel.users.map(([who, geometry]) => el("li", {}, who, el("br"), el("code", {}, geometry.trim())))),
      el("div", {class: "source"}, kernel.text.split("\n").map((line) => el("div", {}, coloured(line, kernel.language === "python" ? TRITON : CPP, KINDS)))))),
      ...(data.kernels.length ? [] : [el("p", {class: "empty"}, "No site is rewritten, so no kernel runs.")]));
  }

  // The whole.
  const TABS = ["diff", "decisions", "kernels"];
  function tab(name) {
    for (const other of TABS) {
      $(other).hidden = other !== name;
      $(`tab-${other}`).setAttribute("aria-selected", String(other === name));
    }
    if (name === "kernels") drawKernels();
    if (name === "diff" && view) { drawMap(); draw(); scroller.focus({preventScroll: true}); }
    if (location.hash.slice(1) !== name) history.replaceState(null, "", `#${name}`);
  }
  TABS.forEach((name) => $(`tab-${name}`).addEventListener("click", () => tab(name)));
  function theme(name) {
    document.documentElement.dataset.theme = name;
    if (view) { drawMap(); draw(); }
  }
  const other = () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  $("theme").addEventListener("click", other);
  const KEYS = {"j ↓": "next line", "k ↑": "previous line", n: "next change", p: "previous change", Enter: "unfold; in the search: next hit", e: "unfold or fold all",
    "/": "search", "Shift Enter": "previous hit", "1 2 3": "diff, decisions, kernels", "[ ]": "previous, next graph or step", t: "light or dark", Esc: "close"};
  $("keylist").append(...Object.entries(KEYS).flatMap(([key, does]) => [el("dt", {}, key.split(" ").map((part) => el("kbd", {}, part))), el("dd", {}, does)]));
  $("help").addEventListener("click", () => $("keys").showModal());
  $("close").addEventListener("click", () => $("keys").close());
  $("fold").addEventListener("click", () => { view.foldAll(!view.unfolded); foldLabel(); drawMap(); if (selected >= 0) show(selected, true); draw(); });
  $("next").addEventListener("click", () => jump(1));
  $("previous").addEventListener("click", () => jump(-1));
  $("view").addEventListener("change", () => choose(Number($("view").value)));
  const brief = (summary) => { const [gone, come, wire] = summary.match(/\d+/g); return `−${gone} +${come} ~${wire}`; };
  const step = (by) => { const at = Number($("view").value) + by; if (at >= 0 && at < data.views.length) choose(at); };
  const bindings = {j: () => move(1), ArrowDown: () => move(1), k: () => move(-1), ArrowUp: () => move(-1), n: () => jump(1), p: () => jump(-1),
    e: () => $("fold").click(), "[": () => step(-1), "]": () => step(1),
    Enter: () => { if (selected >= 0 && view.open(selected)) { drawMap(); foldLabel(); select(selected); } },
    Escape: () => { selected = -1; detail(-1); draw(); }};
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
    if (event.target === $("search")) {
      if (event.key === "Enter" && !$("diff").hidden) nextHit(event.shiftKey ? -1 : 1);
      if (event.key === "Escape") { $("search").value = ""; $("search").dispatchEvent(new Event("input")); $("search").blur(); }
      return;
    }
    if (event.target.closest("select, input, table") || (event.key === "Enter" && event.target.closest("button"))) return;
    if (event.key === "/") { event.preventDefault(); $("search").focus(); return; }
    if (event.key === "t") return other();
    if (event.key === "?") return $("keys").showModal();
    if (/^[123]$/.test(event.key)) return tab(TABS[event.key - 1]);
    if (!$("diff").hidden && view && bindings[event.key]) { event.preventDefault(); bindings[event.key](); }
  });

  function cards() {
    const count = (decision) => sites.filter((site) => site.decision === decision).length;
    const total = (key) => sites.filter((site) => site.decision === "rewrite" && site.prescored_cost !== null).reduce((sum, site) => sum + (site[key] || 0), 0);
    const found = [];
    if (sites.length) found.push([[String(count("rewrite"))], `of ${sites.length} sites rewritten`], [[String(count("keep"))], "kept exact"]);
    const whole = new Map();  // the first view of each graph is the whole of it
    data.views.forEach((raw) => { if (!whole.has(raw.graph)) whole.set(raw.graph, raw.summary); });
    const [gone, come, wire] = [...whole.values()].map((text) => text.match(/\d+/g).map(Number)).reduce((a, b) => a.map((x, i) => x + b[i]), [0, 0, 0, 0]);
    found.push([[el("span", {class: "minus"}, `−${gone} `), el("span", {class: "plus"}, `+${come} `), el("span", {class: "tilde"}, `~${wire}`)], "nodes removed, added, rewired"]);
    if (total("prescored_cost")) {
      found.push([[`${costs(total("exact_cost"))} → ${costs(total("prescored_cost"))}`], "attention of rewritten sites, exact → prescored"]);
      found.push([[percent(total("prescored_cost") / total("exact_cost"))], "of the multiply-adds left"]);
    }
    if (data.logs.length > 1) found.push([[String(data.logs.length)], "graphs"]);
    $("cards").replaceChildren(...found.map(([value, label]) => el("div", {class: "card"}, el("b", {}, value), el("span", {}, label))));
  }

  document.title = `${data.title} · prescore`;
  $("title").textContent = data.title;
  $("title").title = data.title;
  data.logs.forEach((log, graph) => {
    const group = el("optgroup", {label: log.title});
    data.views.forEach((raw, at) => { if (raw.graph === graph) group.append(el("option", {value: String(at)}, `${raw.name}   ${brief(raw.summary)}`)); });
    if (group.firstChild) $("view").append(group);
  });
  cards();
  chips();
  head();
  table();
  document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const first = data.views.findIndex((raw) => !/^0 removed, 0 added, 0 rewired/.test(raw.summary));
  if (data.views.length) choose(Math.max(0, first));
  else $("scroller").append(el("p", {class: "empty"}, "No graph was captured."));
  tab(TABS.includes(location.hash.slice(1)) ? location.hash.slice(1) : data.tab);
  new ResizeObserver(() => { if (view && !$("diff").hidden) { drawMap(); draw(); } }).observe(scroller);
  document.documentElement.dataset.ready = "true";
})();
