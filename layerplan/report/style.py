"""The page's style sheet: colours of outcomes, and what becomes of tables and figures on a narrow screen."""

STYLE = """
:root{--ink:#111827;--soft:#4b5563;--line:#e5e7eb;--train:#b45309;--frozen:#dbeafe;--better:#15803d;--worse:#b91c1c}
body{font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Noto Sans CJK SC",sans-serif;color:var(--ink);
max-width:860px;margin:3rem auto;padding:0 1.2rem}
h1{font-size:1.7rem;margin:0 0 .2rem;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:2.4rem 0 .6rem;
border-bottom:1px solid var(--line);padding-bottom:.3rem}p{margin:.5rem 0}.soft{color:var(--soft)}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:left;padding:.35rem .6rem;border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums}
th{color:var(--soft);font-weight:600}.facts td:first-child{width:55%}.facts td:last-child{overflow-wrap:anywhere}
.map{display:grid;grid-template-columns:repeat(auto-fill,minmax(36px,1fr));gap:3px;margin:1rem 0}
.cell{text-align:center;padding:.5rem 0;border-radius:4px;font-size:.8rem}.named{grid-column:span 2}
.on{background:var(--train);color:#fff}.off{background:var(--frozen);color:#1e3a8a}
.part{background:repeating-linear-gradient(45deg,var(--frozen) 0 4px,#f6c58f 4px 8px);color:#111827}
svg,figure img{width:100%;height:auto}figure{margin:1rem 0}
.scroll{overflow-x:auto;background:linear-gradient(to right,#fff 30%,#fff0) 0 0,linear-gradient(to left,#fff 30%,#fff0) 100% 0,
linear-gradient(to right,#0003,#0000) 0 0,linear-gradient(to left,#0003,#0000) 100% 0;background-repeat:no-repeat;
background-size:40px 100%,40px 100%,12px 100%,12px 100%;background-attachment:local,local,scroll,scroll}
pre{white-space:pre-wrap;overflow-wrap:anywhere}code{font-size:.88em}
.lead{font-size:1.15rem;margin:1rem 0 .3rem}.lead .better{color:var(--better)}.lead .worse{color:var(--worse)}
.verdict{border-left:3px solid var(--soft);padding:.2rem 0 .2rem .8rem;margin:.6rem 0;overflow-wrap:anywhere}
.verdict.better{border-color:var(--better)}.verdict.worse{border-color:var(--worse)}
.cases td{white-space:pre-wrap;overflow-wrap:anywhere;vertical-align:top;width:33%}
details{margin:.6rem 0}summary{cursor:pointer;color:var(--soft)}
@media (max-width:640px){
body{margin:1.2rem auto;padding:0 .8rem}th,td{padding:.35rem .4rem}
.stack thead{display:none}.stack tr{display:block;padding:.5rem 0;border-bottom:1px solid var(--line)}
.stack td{display:flex;gap:.8rem;border:0;padding:.1rem 0;width:auto;overflow-wrap:anywhere}
.stack td:first-child{font-weight:600}.stack td:first-child::before{display:none}
.stack td::before{content:attr(data-label);color:var(--soft);flex:0 0 40%;white-space:normal}
.cases td{display:block}.cases td::before{display:block;font-size:.85rem}
.wide svg,.wide img{min-width:640px}.wide::before{content:"wider than the screen: scroll sideways \\2192";display:block;
text-align:right;color:var(--soft);font-size:.8rem}
}
"""
