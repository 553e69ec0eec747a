"use strict";
// Filters of the pairs, kept in the address so that a view can be passed on; and the light on what grounds an answer.
const form = document.querySelector(".filters");
const fields = [...form.elements].filter((field) => field.name);
const articles = [...document.querySelectorAll("article")].map((article) => ({
  article,
  passage: article.querySelector(".passage").textContent.toLowerCase(),
  marks: [...article.querySelectorAll("mark")].map((mark) => ({ mark, numbers: mark.dataset.pairs.split(" ") })),
  pairs: [...article.querySelectorAll("li")].map((item) => ({ item, words: item.textContent.toLowerCase() })),
}));

function apply() {
  const asked = Object.fromEntries(fields.map((field) => [field.name, field.value]));
  asked.q = asked.q.trim().toLowerCase();
  const filtering = Object.values(asked).some(Boolean);
  let shown = 0;
  for (const { article, passage, marks, pairs } of articles) {
    const inText = passage.includes(asked.q);
    const seen = new Set();
    for (const { item, words } of pairs) {
      const fits = ["verdict", "format", "reason"].every((name) => !asked[name] || item.dataset[name] === asked[name]);
      item.hidden = !(fits && (inText || words.includes(asked.q)));
      if (!item.hidden) seen.add(item.dataset.number);
    }
    shown += seen.size;
    article.hidden = filtering && !seen.size && !(inText && asked.q && !asked.verdict && !asked.format && !asked.reason);
    for (const { mark, numbers } of marks) mark.classList.toggle("off", !numbers.some((number) => seen.has(number)));
  }
  for (const section of document.querySelectorAll(".group")) {
    section.hidden = !section.querySelector("article:not([hidden])");
  }
  const total = articles.reduce((sum, { pairs }) => sum + pairs.length, 0);
  form.querySelector("output").value = filtering
    ? `${shown.toLocaleString("en")} of ${total.toLocaleString("en")} pairs`
    : `${total.toLocaleString("en")} pairs`;
}

function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  for (const field of fields) {
    field.value = asked.get(field.name) ?? "";
    if (field.selectedIndex === -1) field.selectedIndex = 0;
  }
  apply();
}

function writeAddress() {
  const asked = fields.filter((field) => field.value.trim()).map((field) => [field.name, field.value]);
  history.replaceState(null, "", `#${new URLSearchParams(asked)}`);
  apply();
}

function light(item, on) {
  const { marks } = articles.find(({ article }) => article.contains(item));
  const found = marks.filter(({ numbers }) => numbers.includes(item.dataset.number)).map(({ mark }) => mark);
  for (const mark of found) mark.classList.toggle("lit", on);
  return found[0];
}

for (const { article, marks, pairs } of articles) {
  for (const { item } of pairs) {
    const button = item.querySelector("button");
    if (!button) continue;
    item.addEventListener("mouseenter", () => light(item, true));
    item.addEventListener("mouseleave", () => light(item, document.activeElement === button));
    button.addEventListener("focus", () => light(item, true));
    button.addEventListener("blur", () => light(item, false));
    button.addEventListener("click", () => light(item, true).scrollIntoView({ block: "nearest", behavior: "smooth" }));
  }
  for (const { mark, numbers } of marks) {
    const items = numbers.map((number) => article.querySelector(`li[data-number="${number}"]`)).filter(Boolean);
    mark.addEventListener("mouseenter", () => items.forEach((item) => item.classList.add("lit")));
    mark.addEventListener("mouseleave", () => items.forEach((item) => item.classList.remove("lit")));
  }
}
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", writeAddress);
form.addEventListener("reset", () => setTimeout(writeAddress));
addEventListener("hashchange", readAddress);
form.hidden = false;
readAddress();
