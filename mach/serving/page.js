"use strict";
const at = (id) => document.getElementById(id);
const PAUSE = 100; // milliseconds after the last key
let projects = [], last = null, turn = 0, timer = 0, token = "";

const project = () => projects.find((one) => one.project_id === at("project").value);
const address = (verb) => `/v1/projects/${encodeURIComponent(at("project").value)}/${verb}`;

function tell(text, isBad = false) {
  at("told").textContent = text;
  at("told").classList.toggle("bad", isBad);
}

async function ask(path, body) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const options = { headers };
  if (body !== undefined) {
    options.method = "POST";
    if (body instanceof URLSearchParams) options.body = body;
    else { options.body = JSON.stringify(body); headers["Content-Type"] = "application/json"; }
  }
  const response = await fetch(path, options);
  if (response.status === 401) at("access").hidden = false;
  const content = response.status === 204 ? null : await response.json();
  if (!response.ok) throw new Error(content.detail || response.statusText);
  return content;
}

const politely = (verb) => async (...given) => {
  try { await verb(...given); } catch (error) { tell(error.message, true); }
};

function form() {
  return new URLSearchParams({ text: at("text").value, limit: at("limit").value || "10" });
}

const suggest = politely(async () => {
  clearTimeout(timer);
  const mine = ++turn;
  if (!at("text").value.trim() || !project()) {
    last = null;
    at("results").replaceChildren();
    tell("");
    return;
  }
  const answer = await ask(address("suggest"), form());
  if (mine !== turn) return; // a later text was asked for
  last = answer;
  at("results").replaceChildren(...answer.results.map(shown));
  const version = `version ${answer.version}`;
  tell(answer.known ? `${answer.results.length} classes, ${version}` : `No word of it is known: the answer says nothing of it (${version})`);
});

function element(name, text = "", kind = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function shown(one) {
  const item = element("li"), bar = element("div", "", "bar"), fill = element("div");
  const percent = `${(100 * one.score).toFixed(1)} %`;
  fill.style.width = `${Math.max(0, Math.min(100, 100 * one.score))}%`;
  bar.append(fill);
  bar.setAttribute("aria-hidden", "true");
  item.append(element("span", one.label ?? one.id, "label"), element("span", percent, "share"), bar);
  const marks = element("div", "", project().learning ? "marks" : "asks");
  const verbs = [["Why", () => why(one, item)]];
  if (project().learning) verbs.push(["Right", () => teach(one)], ["Wrong", () => wrong(one)]);
  for (const [word, verb] of verbs) {
    const button = element("button", word);
    button.type = "button";
    button.setAttribute("aria-label", `${word}: ${one.label}`);
    button.addEventListener("click", verb);
    marks.append(button);
  }
  item.append(marks);
  return item;
}

const why = politely(async (one, item) => {
  const before = item.querySelector(".why");
  if (before) { before.remove(); return; }
  const text = at("text").value;
  const asked = new URLSearchParams({ text, limit: 1, allowed: one.label, explain: true });
  const [found] = (await ask(address("suggest"), asked)).results;
  if (!found?.explanation) return;
  const told = element("div", "", "why");
  told.append(marked(text, found.explanation), ...found.explanation.words.filter((word) => word.lost > 0).slice(0, 5).map(
    (word) => element("p", `${word.text}: ${(100 * word.probability).toFixed(1)} % without it`)));
  if (told.childElementCount === 1) told.append(element("p", "No word of the text speaks for it."));
  item.append(told);
});

function marked(text, explanation) { // the words for the class, the stronger the more
  const letters = Array.from(text), shown = element("p"), [most] = explanation.words;
  const spans = explanation.words.filter((word) => word.lost > 0).flatMap(
    (word) => word.spans.map(([begin, end]) => [begin, end, word.lost / most.lost]));
  let done = 0;
  for (const [begin, end, share] of spans.sort((a, b) => a[0] - b[0])) {
    if (begin < done || share < 0.05) continue;
    const mark = element("mark", letters.slice(begin, end).join(""));
    mark.style.setProperty("--share", `${Math.round(20 + 80 * share)}%`);
    shown.append(letters.slice(done, begin).join(""), mark);
    done = end;
  }
  shown.append(letters.slice(done).join(""));
  return shown;
}

const teach = politely(async (one) => {
  at("instead").hidden = true;
  await ask(address("learn"), [{ text: at("text").value, subjects: [{ id: one.id }] }]);
  await suggest();
  tell(`Learned that it is ${one.label}; ${at("told").textContent}`);
});

function wrong(one) {
  at("asked").textContent = `What is right instead of ${one.label}?`;
  at("search").value = "";
  const others = last.results.filter((other) => other.id !== one.id).slice(0, 5);
  at("found").replaceChildren(...others.map(choice));
  at("instead").hidden = false;
  at("search").focus();
}

function choice(one) {
  const item = element("li"), button = element("button", one.label);
  button.type = "button";
  button.addEventListener("click", () => teach(one));
  item.append(button);
  return item;
}

const search = politely(async () => {
  const query = at("search").value;
  const answer = await ask(`${address("classes")}?${new URLSearchParams({ query, limit: 10 })}`);
  if (query === at("search").value) at("found").replaceChildren(...answer.results.map(choice));
});

const add = politely(async (event) => {
  event.preventDefault();
  const added = await ask(address("classes"), { name: at("name").value, examples: [at("text").value] });
  at("name").value = "";
  await suggest();
  tell(`Added ${added.label}; ${at("told").textContent}`);
});

async function copy(text) {
  await navigator.clipboard.writeText(text);
  tell("Copied");
}

function curl() {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const secret = token ? ` -H ${quoted("Authorization: Bearer TOKEN")}` : "";
  const fields = [...form()].map(([name, value]) => ` --data-urlencode ${quoted(`${name}=${value}`)}`);
  return `curl ${quoted(location.origin + address("suggest"))}${secret}${fields.join("")}`;
}

const begin = politely(async () => {
  projects = (await ask("/v1/projects")).projects;
  at("access").hidden = true;
  at("project").replaceChildren(...projects.map((one) => new Option(one.name, one.project_id)));
  changed();
});

function changed() {
  at("add").hidden = !project()?.learning;
  at("instead").hidden = true;
  suggest();
}

at("text").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(suggest, PAUSE); });
at("limit").addEventListener("input", suggest);
at("project").addEventListener("change", changed);
at("search").addEventListener("input", search);
at("cancel").addEventListener("click", () => { at("instead").hidden = true; at("text").focus(); });
at("instead").addEventListener("keydown", (event) => { if (event.key === "Escape") at("cancel").click(); });
at("add").addEventListener("submit", add);
at("json").addEventListener("click", politely(() => copy(JSON.stringify(last, null, 1))));
at("curl").addEventListener("click", politely(() => copy(curl())));
at("enter").addEventListener("click", () => { token = at("token").value; begin(); });
begin();
